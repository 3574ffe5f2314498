"""Images per second of an engine in this process, by batch size. The figures belong to this machine.

    python -m benchmarks.throughput [--weights FILE] [--device cpu]

Run it on an otherwise idle machine.
"""

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean

import numpy as np

from app import engines
from app.engines import Engine
from app.engines.hardware import available_cpus, cpu_model
from app.errors import ThirtytwoError
from app.model import weights
from app.model.weights import BUNDLED
from benchmarks.images import Images, noise

BATCHES = (1, 8, 32, 128)
WARM_UP_CALLS = 2


def measure(
    engine: Callable[[Images], object],
    images: Images,
    batches: Sequence[int] = BATCHES,
    seconds: float = 2.0,
) -> dict[int, float]:
    """Images/s for each batch size, for `seconds` each. Every call gets the next of the images uint8 [N, S, S, 3].

    A cascade's rate depends on them: noise passes all stages, which is the worst case.
    """
    rates = {}
    for batch in batches:
        rows = np.arange(batch)
        for _ in range(WARM_UP_CALLS):
            engine(images[rows % len(images)])
        durations: list[float] = []
        end = time.monotonic() + seconds
        while not durations or time.monotonic() < end:
            part = images[(rows + batch * len(durations)) % len(images)]
            start = time.perf_counter()
            engine(part)
            durations.append(time.perf_counter() - start)
        rates[batch] = batch / fmean(durations)
    return rates


def describe(engine: Engine) -> str:
    """Engine, precision and hardware in one line."""
    hardware = f"{available_cpus()} CPUs, {cpu_model()}" if engine.device == "cpu" else engine.device
    return f"{engine.name} in {engine.precision} on {hardware}"


def table(rates: Mapping[str, Mapping[int, float]]) -> str:
    """Markdown; images/s by kind of image and batch size."""
    rows = [f"| {batch} | " + " | ".join(f"{rate[batch]:,.0f}" for rate in rates.values()) + " |" for batch in BATCHES]
    head = "| batch | " + " | ".join(f"images/s, {name}" for name in rates) + " |"
    return "\n".join([head, "| ---: |" + " ---: |" * len(rates), *rows])


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
    kinds = {"reference images": loaded.reference_images, "noise": noise(size=loaded.card.input_size)}
    rates = {name: measure(engine, images, seconds=arguments.seconds) for name, images in kinds.items()}
    print(describe(engine), table(rates), sep="\n\n")


if __name__ == "__main__":
    main()
