"""The network exclusive on each engine and precision, by threads and batch size, and its accuracy where data is given.

python -m benchmarks.engines --data folder-of-cifar-10
"""

import argparse
import subprocess
import sys
from pathlib import Path

from app import engines
from app.errors import WeightsError
from app.model import weights
from app.settings import Settings
from benchmarks import throughput
from benchmarks.serving import LIMITS, ROOT, SIZES
from training import data as folders
from training import metrics

ENGINES = (("openvino", "int8"), ("openvino", "bfloat16"), ("openvino", "float32"), ("torch", "bfloat16"),
           ("torch", "float32"))  # fmt: skip
HEAD = f"| engine | precision | threads | {' | '.join(f'batch {size}' for size in SIZES)} | test accuracy |"


def row(name: str, precision: str, threads: int, data: Path | None) -> str:
    """One line of the table: images a second at each batch size."""
    try:
        run = engines.load(weights.load(Settings().weights), "cpu", threads, name, precision)
    except WeightsError as error:
        return f"| {name} | {precision} | {threads} |{' |' * len(SIZES)} {error} |"
    speeds = " | ".join(f"{rate:.0f}" for rate in throughput.measure(run, LIMITS.size, SIZES).values())
    return f"| {name} | {precision} | {threads} | {speeds} | {_accuracy(run, data) if data else ''} |"


def _accuracy(run: engines.Engine, folder: Path) -> str:
    test = folders.load(folder, LIMITS.size, ["test"]).test
    return f"{metrics.accuracy(metrics.predict(run, test.images), test.labels):.2%}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.engines", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, help="CIFAR-10 folder to measure the accuracy on")
    parser.add_argument("--row", nargs=3, help="engine, precision and threads of one row [all, each in its process]")
    arguments = parser.parse_args()
    if arguments.row:
        name, precision, threads = arguments.row
        print(row(name, precision, int(threads), arguments.data), flush=True)
        return
    print(HEAD, "| --- | --- | ---: |" + " ---: |" * (len(SIZES) + 1), sep="\n", flush=True)
    own = [sys.executable, "-m", "benchmarks.engines", *(["--data", str(arguments.data)] if arguments.data else [])]
    for name, precision in ENGINES:
        for threads in (1, 2):
            accuracy = own if threads == 2 else own[:3]
            subprocess.run([*accuracy, "--row", name, precision, str(threads)], cwd=ROOT, check=True)


if __name__ == "__main__":
    main()
