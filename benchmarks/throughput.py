"""Images a second of an engine in this process, which says something of this machine only."""

import platform
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from app.engines import Engine
from app.engines.hardware import available_cpus

BATCHES = (1, 8, 32, 128)


def measure(
    run: Callable[[NDArray[np.uint8]], object], size: int, batches: Sequence[int] = BATCHES, seconds: float = 2.0
) -> dict[int, float]:
    """Images/s for each batch size: the median pass of as many as fit into so many seconds, after two unmeasured."""
    chance, rates = np.random.default_rng(0), {}
    for batch in batches:
        images = chance.integers(0, 256, (batch, size, size, 3), dtype=np.uint8)
        for _ in range(2):
            run(images)
        passes: list[float] = []
        end = time.monotonic() + seconds
        while not passes or time.monotonic() < end:
            begun = time.perf_counter()
            run(images)
            passes.append(time.perf_counter() - begun)
        rates[batch] = batch / median(passes)
    return rates


def figures(run: Engine, size: int, seconds: float = 2.0) -> dict[str, Any]:
    """What a card or a report holds: on which machine, and images/s for each batch size."""
    where = f"{available_cpus()} CPUs, {processor()}" if run.device == "cpu" else run.device
    rates = measure(run, size, seconds=seconds)
    return {
        "machine": f"{run.name} in {run.precision} on {where}",
        "images_per_s": {str(batch): round(rate) for batch, rate in rates.items()},
    }


def processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The model's name on Linux, else what Python knows of it."""
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def table(rates: Mapping[str, float]) -> str:
    """Markdown."""
    rows = [f"| {batch} | {rate:,.0f} |" for batch, rate in rates.items()]
    return "\n".join(["| batch | images/s |", "| --- | --- |", *rows])
