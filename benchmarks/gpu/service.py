"""The service on the device: start, rates by number of workers, and its behaviour when the device fails."""

import asyncio
import io
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from typing import NamedTuple
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import numpy as np
from PIL import Image

from app.commands.serve import raise_descriptor_limit
from benchmarks import payloads
from benchmarks.client import connect
from benchmarks.gpu.findings import Options, guarded, report
from benchmarks.load import LoadResult, closed_loop
from benchmarks.server_process import ROOT, ServerProcess, is_ready, running, service

WORKERS = (1, 4, 8, 16)
CELLS = ((1, 1), (1, 64), (1, 256), (64, 16), (64, 64))  # images of a request, clients
QUICK_WORKERS, QUICK_CELLS = (1, 2), ((1, 4), (64, 2))
PORT = 18081
EXAMPLE = ROOT / "examples" / "cat.png"

HOG = """
import sys, torch
held, size = [], 2**30
while size >= 2**20:
    try:
        held.append(torch.empty(size, dtype=torch.uint8, device=sys.argv[1]))
    except torch.OutOfMemoryError:
        size //= 2
print("full", flush=True)
sys.stdin.read()
"""


class Cell(NamedTuple):
    port: int
    images: int
    clients: int
    seconds: float


def serving(options: Options) -> None:
    """Requests/s by workers, images of a request and clients; the load generator runs on the same CPUs."""
    raise_descriptor_limit()
    cpus = len(os.sched_getaffinity(0))
    generators = max(1, min(4, cpus // 4))
    with ProcessPoolExecutor(generators, multiprocessing.get_context("spawn")) as pool:
        for number, workers in enumerate(QUICK_WORKERS if options.quick else WORKERS):
            with guarded("service", workers=workers):
                _serve(options, pool, generators, workers, PORT + number)


def faults(options: Options) -> None:
    with guarded("SIGTERM under load"):
        _drain(options)
    with guarded("device-side assert"):
        _lose_device(options)
    if options.on_gpu:
        with guarded("full device"):
            _fill_device(options)


def _flags(options: Options) -> list[str]:
    engine = [] if options.on_gpu else ["--engine", "torch"]
    return ["--device", options.device, "--max-queue", "16384", "--log-level", "warning", *engine]


def _serve(options: Options, pool: ProcessPoolExecutor, generators: int, workers: int, port: int) -> None:
    with running(service(port, *_flags(options), "--workers", str(workers)), port) as server:
        report(
            "service started", workers=workers, ready_s=round(server.ready_s, 2), memory_mb=round(server.memory_mb())
        )
        seconds = 0.5 if options.quick else 1.6
        for images, clients in QUICK_CELLS if options.quick else CELLS:
            with guarded("load", workers=workers, images=images, clients=clients):
                shares = [clients // generators + (i < clients % generators) for i in range(generators)]
                cells = [Cell(port, images, share, seconds) for share in shares if share]
                results, cpu_s = _measure(pool, cells, server)
                report("load", workers=workers, images=images, clients=clients, cpus=cpu_s, **_summary(results, images))


def _measure(pool: ProcessPoolExecutor, cells: list[Cell], server: ServerProcess) -> tuple[list[LoadResult], float]:
    """The generators' results, and how many CPUs the service used on average."""
    before, start = server.cpu_s(), time.perf_counter()
    results = list(pool.map(_generate, cells))
    return results, round((server.cpu_s() - before) / (time.perf_counter() - start), 2)


def _generate(cell: Cell) -> LoadResult:
    forms = payloads.forms(payloads.image_files(None), cell.images)
    return asyncio.run(closed_loop(cell.port, forms, cell.clients, cell.seconds, warm_up_s=0.5))


def _summary(results: list[LoadResult], images: int) -> dict[str, object]:
    latencies = [latency for result in results for latency in result.latencies]
    rate = sum(result.rate for result in results)
    statuses = sum((result.statuses for result in results), Counter[int]())
    found: dict[str, object] = {"requests_per_s": round(rate), "images_per_s": round(rate * images)}
    if latencies:
        p50, p99 = np.quantile(latencies, (0.5, 0.99)) * 1e3
        found |= {"p50_ms": round(float(p50), 2), "p99_ms": round(float(p99), 2)}
    other = {status: count for status, count in statuses.items() if status != 200}
    return found | {"other": other, "failures": sum(result.failures for result in results)}


def _drain(options: Options) -> None:
    form = payloads.form(payloads.image_files(None, 1))

    async def client(statuses: Counter[int]) -> None:
        connection = await connect(PORT)
        while not connection.closed:
            try:
                status = await connection.exchange(form)
            except OSError:
                status = 0
            statuses[status] += 1
            if status != 200:
                return

    async def load(pid: int) -> Counter[int]:
        statuses: Counter[int] = Counter()
        clients = [asyncio.create_task(client(statuses)) for _ in range(16)]
        await asyncio.sleep(0.5)
        os.kill(pid, signal.SIGTERM)
        await asyncio.wait(clients, timeout=30)
        return statuses

    with running(service(PORT, *_flags(options)), PORT) as server:
        statuses = asyncio.run(load(server.pid))
        report("SIGTERM under load", statuses=dict(statuses), lost=statuses[0])


def _lose_device(options: Options) -> None:
    """A true device-side assert on a GPU, which no later call of the process recovers from; simulated on a CPU."""
    command = [sys.executable, "-m", "benchmarks.gpu.faulty_service", options.device, str(PORT)]
    with _process(command) as process:
        before, at = _post(EXAMPLE.read_bytes()), _post(_white())
        try:
            exit_code: int | None = process.wait(20)
        except subprocess.TimeoutExpired:
            exit_code = None
        report("device-side assert", before=before, at=at, exit_code=exit_code, ended=exit_code not in (None, 0))


def _fill_device(options: Options) -> None:
    """Another program takes the rest of the memory: a service that runs, and one that starts."""
    with _process(service(PORT, *_flags(options))):
        hog = subprocess.Popen(
            [sys.executable, "-c", HOG, options.device], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert hog.stdin is not None
        assert hog.stdout is not None
        try:
            hog.stdout.readline()
            statuses = Counter(_post(EXAMPLE.read_bytes()) for _ in range(50))
            report("running on a full device", statuses=dict(statuses))
            command = service(PORT + 1, *_flags(options))
            other = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=40, check=False)
            report("starting on a full device", exit_code=other.returncode, lines=other.stderr.splitlines()[-2:])
        finally:
            hog.stdin.close()
            hog.wait(20)


@contextmanager
def _process(command: list[str], wait_s: float = 90) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + wait_s
    try:
        while not is_ready(PORT):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{' '.join(command)} did not start")
            time.sleep(0.05)
        yield process
    finally:
        process.kill()
        process.wait()


def _post(image: bytes) -> int:
    """The status; 0 where the connection was closed."""
    request = Request(f"http://127.0.0.1:{PORT}/predict", image, {"Content-Type": "image/png"})
    try:
        with urlopen(request, timeout=15) as response:  # noqa: S310
            return int(response.status)
    except HTTPError as error:
        return error.code
    except OSError:
        return 0


def _white() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32), "white").save(buffer, "PNG")
    return buffer.getvalue()
