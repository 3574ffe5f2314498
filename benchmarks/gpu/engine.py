"""Versions, reference outputs in each precision, and the rates of the eager engine and of graphs."""

import os
import platform
import subprocess
import time
from importlib.metadata import PackageNotFoundError, version

import torch

from app import engines
from app.engines import Engine, cuda
from benchmarks.gpu.findings import Options, engine_rate, guarded, load_weights, report
from benchmarks.images import pictures

PACKAGES = ("torch", "torchvision", "triton", "numpy", "pillow", "fastapi", "uvicorn", "openvino")
SMI_FIELDS = (
    "name,driver_version,memory.total,memory.used,compute_cap,pcie.link.gen.current,compute_mode,mig.mode.current"
)
SIZES = (1, 8, 32, 64, 128, 256, 512, 1024, 2048)
QUICK_SIZES = (1, 8, 16)


def versions(options: Options) -> None:
    report("machine", python=platform.python_version(), cpus=len(os.sched_getaffinity(0)), **_packages())
    report("cuda", driver=cuda.query_driver(), torch=cuda.query_torch())
    if not options.on_gpu:
        return
    with guarded("nvidia-smi"):
        command = ["nvidia-smi", f"--query-gpu={SMI_FIELDS}", "--format=csv,noheader"]
        report("nvidia-smi", line=subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip())
    start = time.perf_counter()
    torch.zeros(1, device=options.device)
    torch.cuda.synchronize()
    report("context", seconds=round(time.perf_counter() - start, 2))
    for kind in ("pageable", "pinned"):
        with guarded("copy", host=kind):
            report("copy", host=kind, gb_per_s=_copy_rate(options.device, kind == "pinned"))


def references(options: Options) -> None:
    """The largest difference from the reference outputs in each precision; accuracy where there are test images."""
    weights = load_weights()
    for precision in _precisions(options):
        with guarded("reference", precision=precision):
            start = time.perf_counter()
            engine = _engine(options, precision)
            load_s = round(time.perf_counter() - start, 2)
            found = {
                "difference": round(engines.reference_difference(engine, weights), 5),
                "tolerance": engines.TOLERANCE[precision],
                "load_s": load_s,
            }
            report("reference", device=engine.device, precision=precision, **found, **_accuracy(options, engine))


def rates(options: Options) -> None:
    """The engine before and after `prepare`, which captures graphs on a GPU."""
    seconds, sizes = (0.05, QUICK_SIZES) if options.quick else (0.25, SIZES)
    for precision in _precisions(options)[:1] if options.quick else _precisions(options):
        engine = _engine(options, precision)
        for size in sizes:
            with guarded("eager", precision=precision, batch=size):
                report("eager", precision=precision, batch=size, **engine_rate(engine, pictures(size), seconds))
    with guarded("graphs"):
        engine, before = _engine(options, "auto"), time.perf_counter()
        memory = engine.memory()
        engine.prepare(sizes, pictures(1)[0])
        capture_s = round(time.perf_counter() - before, 2)
        report("prepared", sizes=len(sizes), seconds=capture_s, memory_before=memory, memory=engine.memory())
        for size in (*sizes, sizes[1] - 3):  # the last one is filled up
            report("graph", precision=engine.precision, batch=size, **engine_rate(engine, pictures(size), seconds))


def _packages() -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def _precisions(options: Options) -> tuple[str, ...]:
    return ("bfloat16", "float16", "float32") if options.on_gpu else ("float32", "bfloat16")


def _engine(options: Options, precision: str) -> Engine:
    return engines.load(load_weights(), options.device, 0, "torch", precision)


def _accuracy(options: Options, engine: Engine) -> dict[str, float]:
    if options.data is None:
        return {}
    from training import data, metrics  # needs scipy, as the rest does not

    test = data.load(options.data, load_weights().card.input_size, ["test"]).test
    return {"accuracy": round(metrics.accuracy(metrics.predict(engine, test.images), test.labels), 4)}


def _copy_rate(device: str, pinned: bool, size: int = 2**28) -> float:
    host = torch.ones(size, dtype=torch.uint8, pin_memory=pinned)
    target = torch.empty(size, dtype=torch.uint8, device=device)
    best = float("inf")
    for _ in range(4):
        torch.cuda.synchronize()
        start = time.perf_counter()
        target.copy_(host, non_blocking=True)
        torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return round(size / best / 1e9, 1)
