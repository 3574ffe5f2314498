"""Training on the device: augmentation alone, steps in several forms, a short run and the full default recipe."""

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from app.engines.pytorch import available_device
from app.model import weights
from benchmarks.gpu.findings import Options, guarded, report
from benchmarks.images import noise
from benchmarks.server_process import ROOT
from training import data
from training.data import Split
from training.loader import CPU, Batch, Loader
from training.precision import Precision
from training.recipe import Recipe
from training.train import build_network, disable_malloc_trim
from training.trainer import Trainer

CLASSES = 10


def steps(options: Options) -> None:
    disable_malloc_trim()
    split, recipe = _split(options), _recipe(options)
    device, seconds = available_device(options.device), 0.3 if options.quick else 2.0
    lossy = recipe.model_copy(update={"jpeg_prob": 0.5})
    report("training images", count=len(split), threads=torch.get_num_threads())
    for place in dict.fromkeys((CPU, device)):
        for each in (recipe, lossy):
            with guarded("augmentation", device=str(place), jpeg=each.jpeg_prob):
                rate = _epoch_rate(Loader(split, each, device=place), seconds, place)
                report("augmentation", device=str(place), jpeg=each.jpeg_prob, images_per_s=rate)
    with guarded("same batches"):
        one, other = (next(Loader(split, recipe, device=place).epoch(3)) for place in (CPU, device))
        report("same batches", bit_for_bit=bool(torch.equal(one.images, other.images.cpu())))
    dtypes = (torch.bfloat16, torch.float16) if options.on_gpu else (torch.bfloat16,)
    for dtype in dtypes:
        for backend in ("", "inductor") if options.on_gpu else ("",):
            with guarded("step", dtype=str(dtype), compiled=bool(backend)):
                _measure_step(options, Loader(split, recipe, device=device), device, dtype, backend)


def short(options: Options) -> None:
    """Two epochs through the command line, then torchrun on one process."""
    with tempfile.TemporaryDirectory() as folder:
        _train(options, "short run", Path(folder), [sys.executable, "-m", "training.train"], "--epochs", "2")
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=1", "--standalone"]
        _train(options, "torchrun", Path(folder), [*launcher, "-m", "training.train"], "--epochs", "1")


def full(options: Options) -> None:
    """The default recipe to its end."""
    with tempfile.TemporaryDirectory() as folder:
        epochs = ("--epochs", "3") if options.quick else ()
        _train(options, "full run", Path(folder), [sys.executable, "-m", "training.train"], *epochs)


def _split(options: Options) -> Split:
    if options.data is not None:
        return data.load(options.data, 32, ["train"]).train
    count = 400 if options.quick else 47_500
    return Split(torch.from_numpy(noise(count)), torch.arange(count) % CLASSES)


def _recipe(options: Options) -> Recipe:
    return Recipe(widths=(8, 16, 16), batch_size=100) if options.quick else Recipe()


def _epoch_rate(loader: Loader, seconds: float, device: torch.device) -> int:
    """Images/s of the loader alone."""
    next(loader.epoch(0))
    images, start, epoch = 0, time.perf_counter(), 1
    while time.perf_counter() - start < seconds:
        for batch in loader.epoch(epoch):
            images += len(batch.labels)
            if time.perf_counter() - start > seconds:
                break
        epoch += 1
    _wait(device)
    return round(images / (time.perf_counter() - start))


def _measure_step(options: Options, loader: Loader, device: torch.device, dtype: torch.dtype, backend: str) -> None:
    network = build_network(loader.recipe, loader.split, CLASSES)
    trainer = Trainer(network, loader.recipe, loader, device, None, backend, Precision.of(device, dtype))
    batches = [batch for _, batch in zip(range(4), loader.epoch(0), strict=False)]
    start = time.perf_counter()
    _run_steps(trainer._train_step, batches, 3, device)
    first_s, count = time.perf_counter() - start, 4 if options.quick else 40
    start = time.perf_counter()
    _run_steps(trainer._train_step, batches, count, device)
    seconds = (time.perf_counter() - start) / count
    found = {
        "ms": round(seconds * 1e3, 2),
        "images_per_s": round(loader.batch_size / seconds),
        "first_s": round(first_s, 1),
    }
    report("step", dtype=str(dtype), compiled=bool(backend), **found)


def _run_steps(step: Callable[[Batch], object], batches: list[Batch], count: int, device: torch.device) -> None:
    for i in range(count):
        step(batches[i % len(batches)])
    _wait(device)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _train(options: Options, what: str, folder: Path, launcher: list[str], *flags: str) -> None:
    out = folder / "model.safetensors"
    source, more = _folder(options, folder / "noise")
    small = ["--widths", "8,16,16", "--batch-size", "100"] if options.quick else []
    command = [*launcher, "--data", str(source), "--out", str(out), "--run-dir", str(folder / what), *more, *small]
    command += ["--device", options.device, "--finetune", "none", "--overwrite", *flags]
    start = time.perf_counter()
    with guarded(what):
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=options.limit_s - 10, check=False
        )
        found = {"exit_code": done.returncode, "seconds": round(time.perf_counter() - start, 1)}
        if done.returncode:
            report(what, **found, lines=done.stderr.splitlines()[-3:])
            return
        card = weights.load(out).card
        report(
            what, **found, last=done.stdout.splitlines()[-2:], test_accuracy=card.test_accuracy, results=card.results
        )


def _folder(options: Options, folder: Path) -> tuple[Path, list[str]]:
    """The data folder and its flags; noise of ten tints as PNG files where there is none."""
    if options.data is not None:
        return options.data, []
    if not folder.exists():
        for i, image in enumerate(noise(400 if options.quick else 4000) // 4):
            place = folder / "train" / f"class{i % CLASSES}"
            place.mkdir(parents=True, exist_ok=True)
            tinted = (image + 18 * (i % CLASSES)).astype(np.uint8)
            Image.fromarray(tinted).save(place / f"{i}.png", compress_level=1)
    return folder, ["--no-test"]
