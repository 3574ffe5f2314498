"""Throughput of each engine and precision by threads and batch size; test accuracy where data is given.

python -m benchmarks.engines --data folder-of-cifar-10
"""

import argparse
import subprocess
import sys
from pathlib import Path

import numpy as np

from app import engines
from app.errors import ThirtytwoError
from app.model import weights
from app.settings import Settings
from benchmarks import throughput
from benchmarks.components import BATCH_SIZES
from benchmarks.images import noise
from benchmarks.server_process import ROOT

ENGINES = (
    ("openvino", "int8"),
    ("openvino", "bfloat16"),
    ("openvino", "float32"),
    ("torch", "bfloat16"),
    ("torch", "float32"),
)
HEAD = (
    f"| engine | precision | threads | {' | '.join(f'batch {size}' for size in BATCH_SIZES)} | test accuracy |\n"
    f"| --- | --- | ---: |{' ---: |' * (len(BATCH_SIZES) + 1)}"
)


def row(name: str, precision: str, threads: int, data: Path | None) -> str:
    """Images/s at each batch size, in Markdown."""
    try:
        loaded = weights.load(Settings().weights)
        engine = engines.load(loaded, "cpu", threads, name, precision)
    except ThirtytwoError as error:
        return f"| {name} | {precision} | {threads} |{' |' * len(BATCH_SIZES)} {error} |"
    size = loaded.card.input_size
    measured = throughput.measure(engine, noise(size=size), BATCH_SIZES)  # all stages of a cascade
    rates = " | ".join(f"{rate:.0f}" for rate in measured.values())
    return f"| {name} | {precision} | {threads} | {rates} | {f'{_accuracy(engine, data, size):.2%}' if data else ''} |"


def _accuracy(engine: engines.Engine, folder: Path, size: int, batch: int = 256) -> float:
    from training import data  # needs torch, as the rest does not

    test = data.load(folder, size, ["test"]).test
    images, labels = test.images.numpy(), test.labels.numpy()
    predicted = [engine(images[i : i + batch]).probabilities.argmax(1) for i in range(0, len(images), batch)]
    return float((np.concatenate(predicted) == labels).mean())


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.engines", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, help="CIFAR-10 folder to measure the accuracy on")
    parser.add_argument("--row", nargs=3, help="engine, precision and threads of one row [all, each in its process]")
    arguments = parser.parse_args()
    if arguments.row:
        name, precision, threads = arguments.row
        print(row(name, precision, int(threads), arguments.data), flush=True)
        return
    print(HEAD, flush=True)
    command = [sys.executable, "-m", "benchmarks.engines"]
    data = ["--data", str(arguments.data)] if arguments.data else []
    for name, precision in ENGINES:
        for threads in (1, 2):
            accuracy = data if threads == 2 else []  # it does not depend on the threads
            subprocess.run([*command, *accuracy, "--row", name, precision, str(threads)], cwd=ROOT, check=True)


if __name__ == "__main__":
    main()
