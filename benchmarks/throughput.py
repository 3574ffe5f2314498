"""Images per second of an engine in this process, by batch size. The figures belong to this machine.

    python -m benchmarks.throughput [--weights FILE] [--device cpu]

Run it on an otherwise idle machine.
"""

import argparse
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median

import numpy as np
from numpy.typing import NDArray

from app import engines
from app.engines import Engine
from app.engines.hardware import available_cpus
from app.errors import ThirtytwoError
from app.model import weights
from app.model.weights import BUNDLED

BATCHES = (1, 8, 32, 128)
WARM_UP_CALLS = 2


def measure(
    engine: Callable[[NDArray[np.uint8]], object], size: int, batches: Sequence[int] = BATCHES, seconds: float = 2.0
) -> dict[int, float]:
    """Images/s for each batch size, from the median call of as many as fit into `seconds`; noise of size x size."""
    generator, rates = np.random.default_rng(0), {}
    for batch in batches:
        images = generator.integers(0, 256, (batch, size, size, 3), dtype=np.uint8)
        for _ in range(WARM_UP_CALLS):
            engine(images)
        durations: list[float] = []
        end = time.monotonic() + seconds
        while not durations or time.monotonic() < end:
            start = time.perf_counter()
            engine(images)
            durations.append(time.perf_counter() - start)
        rates[batch] = batch / median(durations)
    return rates


def describe(engine: Engine) -> str:
    """Engine, precision and hardware in one line."""
    hardware = f"{available_cpus()} CPUs, {cpu_model()}" if engine.device == "cpu" else engine.device
    return f"{engine.name} in {engine.precision} on {hardware}"


def cpu_model(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The CPU's model name on Linux, else Python's name of the platform."""
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def table(rates: Mapping[int, float]) -> str:
    """Markdown."""
    rows = [f"| {batch} | {rate:,.0f} |" for batch, rate in rates.items()]
    return "\n".join(["| batch | images/s |", "| ---: | ---: |", *rows])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.throughput", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--weights", type=Path, default=BUNDLED, metavar="FILE", help="weights file [the bundled one]")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps [%(default)s]")
    parser.add_argument("--seconds", type=float, default=2.0, metavar="FLOAT", help="per batch size [%(default)s]")
    arguments = parser.parse_args(argv)
    try:
        loaded = weights.load(arguments.weights)
        engine = engines.load(loaded, arguments.device)
    except ThirtytwoError as error:
        sys.exit(f"{type(error).__name__}: {error}")
    print(describe(engine), table(measure(engine, loaded.card.input_size, seconds=arguments.seconds)), sep="\n\n")


if __name__ == "__main__":
    main()
