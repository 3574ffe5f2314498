"""What the components of a request cost alone, in this process.

python -m benchmarks.components
"""

import argparse
import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import cycle
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np
import uvloop
from numpy.typing import NDArray

from app import engines
from app.api.uploads import FormParser
from app.inference.batcher import Batcher
from app.inference.queue import RequestQueue
from app.model import weights
from app.model.preprocessing import Limits, decode
from app.settings import Settings
from benchmarks import throughput
from benchmarks.payloads import File, form, image_files

LIMITS = Limits(32, 10_000_000)
BATCH_SIZES = (1, 8, 32, 64, 128)


class ComponentCosts(NamedTuple):
    """CPU time in microseconds per call; wall time where named so; images/s by batch size."""

    parse_us: float
    decode_us: float
    cold_latency_us: float  # wall time of one image in the network after a pause
    hand_over_us: float  # wall time from the event loop to an inference thread and back, after a pause
    engine: str
    precision: str
    throughput: dict[int, float]  # of one call that uses all cores
    concurrent_throughput: dict[int, float]  # of one call per stream, added up

    @property
    def peak_throughput(self) -> float:
        return max(*self.throughput.values(), *self.concurrent_throughput.values())


def component_costs(files: list[File], seconds: float = 2.0) -> ComponentCosts:
    """`seconds` for each batch size of the network."""
    bodies = [form([file]).partition(b"\r\n\r\n")[2] for file in files]
    settings = Settings()
    engine = engines.load(weights.load(settings.weights), "cpu")
    images = np.stack([decode(data, LIMITS).pixels for _, data in files])
    order = cycle(range(len(images)))

    async def infer() -> None:
        index = next(order)
        engine(images[index : index + 1])

    return ComponentCosts(
        cpu_us(lambda i: _parse(bodies[i % len(bodies)], settings)),
        cpu_us(lambda i: decode(files[i % len(files)][1], LIMITS)),
        uvloop.run(_cold_latency_us(infer)),
        uvloop.run(_hand_over_us()),
        engine.name,
        engine.precision,
        throughput.measure(engine, images, BATCH_SIZES, seconds),
        _concurrent_throughput(engine, images, seconds),
    )


def cpu_us(call: Callable[[int], object], seconds: float = 0.5, repeats: int = 3) -> float:
    """CPU time of all threads per call in microseconds; the best of the repeats, `seconds` in all."""
    best = float("inf")
    for _ in range(repeats):
        call(0)
        start, calls = time.process_time(), 0
        while time.process_time() - start < seconds / repeats:
            call(calls)
            calls += 1
        best = min(best, (time.process_time() - start) / calls * 1e6)
    return best


def _parse(body: bytes, settings: Settings) -> None:
    parser = FormParser("BOUNDARY", settings)
    parser.feed(body)
    parser.close()


async def _cold_latency_us(call: Callable[[], Awaitable[None]], repeats: int = 500, pause_s: float = 0.001) -> float:
    """Median wall time of a call after a pause, in microseconds."""
    latencies = []
    for _ in range(repeats):
        await asyncio.sleep(pause_s)
        start = time.perf_counter()
        await call()
        latencies.append(time.perf_counter() - start)
    return median(latencies) * 1e6


class _Identity:
    def __call__(self, items: Sequence[int], exclusive: bool) -> Sequence[int]:
        return items

    def verify(self) -> None:
        pass


async def _hand_over_us() -> float:
    """The batcher with a model that returns its input."""
    model = _Identity()
    batcher: Batcher[int, int] = Batcher([1], RequestQueue(1))
    batcher.start()

    async def submit() -> None:
        with batcher.queue.reserve(1) as reservation:
            await batcher.submit(model, [0], reservation)

    try:
        return await _cold_latency_us(submit)
    finally:
        batcher.close(0)


def _concurrent_throughput(engine: engines.Engine, images: NDArray[np.uint8], seconds: float) -> dict[int, float]:
    call = partial(engine, exclusive=engine.streams == 1)
    with ThreadPoolExecutor(engine.streams) as pool:
        futures = [pool.submit(throughput.measure, call, images, BATCH_SIZES, seconds) for _ in range(engine.streams)]
        rates = [future.result() for future in futures]
    return {size: sum(rate[size] for rate in rates) for size in BATCH_SIZES}


def table(costs: ComponentCosts) -> str:
    """Markdown."""
    rows = [
        "| component | us |",
        "| --- | ---: |",
        f"| form parser, CPU | {costs.parse_us:.1f} |",
        f"| decoding, CPU | {costs.decode_us:.1f} |",
        f"| network, one image after a pause | {costs.cold_latency_us:.0f} |",
        f"| event loop to inference thread and back | {costs.hand_over_us:.0f} |",
        "",
        f"| {costs.engine} in {costs.precision}, batch | images/s | images/s, one call per stream |",
        "| ---: | ---: | ---: |",
    ]
    rows += [
        f"| {size} | {rate:.0f} | {costs.concurrent_throughput[size]:.0f} |" for size, rate in costs.throughput.items()
    ]
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.components", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--data", type=Path, help="CIFAR-10 folder with the images [the examples]")
    arguments = parser.parse_args()
    print(table(component_costs(image_files(arguments.data))))


if __name__ == "__main__":
    main()
