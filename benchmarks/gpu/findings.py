"""Findings as JSON lines on stdout, and what all parts share: options and rates."""

import argparse
import json
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from app.engines import Engine
from app.model import weights
from app.model.weights import Weights
from app.settings import Settings
from benchmarks.images import Images


class Options(NamedTuple):
    """`data` is a folder for `training.train`, or None for noise. `quick` has small sizes and short times."""

    device: str
    out: Path
    quick: bool
    data: Path | None
    limit_s: float

    @classmethod
    def of(cls, arguments: argparse.Namespace) -> "Options":
        return cls(arguments.device, arguments.out, arguments.quick, arguments.data, arguments.limit)

    @property
    def on_gpu(self) -> bool:
        return self.device != "cpu"


def report(what: str, **found: Any) -> None:
    print(json.dumps({"what": what, **found}, default=str), flush=True)


@contextmanager
def guarded(what: str, **found: Any) -> Iterator[None]:
    """A failure of one measurement is reported and leaves the others of its part."""
    try:
        yield
    except Exception as error:
        traceback.print_exc()
        report(what, **found, failure=f"{type(error).__name__}: {str(error).partition(chr(10))[0][:300]}")


def load_weights() -> Weights:
    return weights.load(Settings().weights)


def engine_rate(engine: Engine, images: Images, seconds: float) -> dict[str, float]:
    """Median and 99th percentile of a call in ms, and images/s by the median."""
    for _ in range(3):
        engine(images)
    ms = np.array(list(_times_ms(lambda: engine(images), seconds)))
    median = float(np.median(ms))
    return {
        "ms": round(median, 4),
        "p99_ms": round(float(np.quantile(ms, 0.99)), 4),
        "images_per_s": round(len(images) / median * 1e3),
    }


def _times_ms(call: Callable[[], object], seconds: float, at_least: int = 5) -> Iterator[float]:
    end, count = time.perf_counter() + seconds, 0
    while count < at_least or time.perf_counter() < end:
        start = time.perf_counter()
        call()
        yield (time.perf_counter() - start) * 1e3
        count += 1
