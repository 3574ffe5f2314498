"""`make bench`: the service on loopback under load, beside the lower bounds of its machine.

One run measures all, since other users change the speed of a shared machine: only ratios within a run are comparable.
"""

import argparse
import json
import platform
import time
from collections.abc import Iterable, Iterator
from functools import partial
from math import isnan
from pathlib import Path
from typing import Any

from app.engines.hardware import available_cpus
from benchmarks import components
from benchmarks.client import raise_descriptor_limit
from benchmarks.components import ComponentCosts, component_costs
from benchmarks.load import closed_loop, open_loop
from benchmarks.lower_bound import LowerBound
from benchmarks.measurement import Load, Measurement, measure
from benchmarks.payloads import IMAGES_PER_BULK_REQUEST, File, forms, image_files, post
from benchmarks.server_process import ROOT, ServerProcess, bare_asgi, running, service

CONCURRENCY = (1, 16, 64)
PEAK_SHARES = (0.25, 0.5, 0.75, 2.0)
LARGE_QUEUE = ("--max-queue", "8192")  # for 64 clients with 64 images each

HEAD = (
    "| request | load | requests/s | images/s | p50 ms | p99 ms | CPU us an image: service | client | 429 | failed "
    "| % of bound |\n| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"
)


class Benchmark:
    """Yields each measurement when it is complete; `seconds` of each, after as long a warm-up."""

    def __init__(self, files: list[File], seconds: float, port: int) -> None:
        self._seconds = seconds
        self._port = port
        self._forms = {1: forms(files), IMAGES_PER_BULK_REQUEST: forms(files, IMAGES_PER_BULK_REQUEST)}
        self._raw = [post(data, "application/octet-stream") for _, data in files]
        self.ready_s = 0.0
        self.memory_mb: list[float] = []  # once ready, and after the closed loops

    def bare_asgi(self) -> Iterator[Measurement]:
        with running(bare_asgi(self._port), self._port, "/") as server:
            for images, concurrency in ((1, 1), (1, 16), (1, 64), (IMAGES_PER_BULK_REQUEST, 16)):
                yield self._closed(server, Load("bare ASGI", images, concurrency), self._forms[images])

    def closed_loops(self) -> Iterator[Measurement]:
        with running(service(self._port, *LARGE_QUEUE), self._port) as server:
            self.ready_s, self.memory_mb = server.ready_s, [server.memory_mb()]
            for request, images in (("form", 1), ("raw", 1), ("form", IMAGES_PER_BULK_REQUEST)):
                requests = self._raw if request == "raw" else self._forms[images]
                for concurrency in CONCURRENCY:
                    yield self._closed(server, Load(request, images, concurrency), requests)
            self.memory_mb.append(server.memory_mb())

    def open_loops(self, peak: float) -> Iterator[Measurement]:
        """At shares of a peak in requests/s."""
        with running(service(self._port), self._port) as server:
            for share in PEAK_SHARES:
                drive = partial(open_loop, self._port, self._forms[1], share * peak, self._seconds)
                yield measure(server, Load("form", 1, 0, share), drive)

    def two_workers(self) -> Iterator[Measurement]:
        with running(service(self._port, *LARGE_QUEUE, "--workers", "2"), self._port) as server:
            for images, concurrency in ((1, 64), (IMAGES_PER_BULK_REQUEST, 16)):
                yield self._closed(server, Load("form, 2 workers", images, concurrency), self._forms[images])

    def _closed(self, server: ServerProcess, load: Load, requests: list[bytes]) -> Measurement:
        drive = partial(closed_loop, self._port, requests, load.concurrency, self._seconds, 0.5)
        return measure(server, load, drive)


def run(benchmark: Benchmark, costs: ComponentCosts) -> tuple[LowerBound, list[Measurement]]:
    """Prints the table row by row."""
    bound = LowerBound(costs, list(benchmark.bare_asgi()), available_cpus())
    print(HEAD, *(row(each, bound) for each in bound.bare), sep="\n", flush=True)
    measurements: list[Measurement] = []

    def add(more: Iterable[Measurement]) -> None:
        for each in more:
            measurements.append(each)
            print(row(each, bound), flush=True)

    add(benchmark.closed_loops())
    add(benchmark.open_loops(max(each.requests_per_s for each in measurements if each.load.request == "form")))
    add(benchmark.two_workers())
    return bound, measurements


def report(benchmark: Benchmark, bound: LowerBound, measurements: list[Measurement]) -> dict[str, Any]:
    """What the JSON file holds."""
    return {
        "date": time.strftime("%F"),
        "machine": platform.processor() or platform.machine(),
        "cpus": bound.cpus,
        "ready_s": benchmark.ready_s,
        "memory_mb": benchmark.memory_mb,
        "component_costs": bound.costs._asdict(),
        "bare_asgi": [each.as_json() for each in bound.bare],
        "measurements": [
            each.as_json() | {"share_of_bound": bound.share(each), "cpu_us_split": _split(bound, each)}
            for each in measurements
        ],
    }


def _split(bound: LowerBound, measurement: Measurement) -> dict[str, float] | None:
    return None if isnan(measurement.server_cpu_us) else bound.cpu_split(measurement)._asdict()


def row(measurement: Measurement, bound: LowerBound) -> str:
    """Markdown."""
    m, share = measurement, bound.share(measurement)
    return (
        f"| {m.load.request}, {m.load.images} | {m.load} | {m.requests_per_s:.0f} | {m.images_per_s:.0f} | "
        f"{m.p50_ms:.2f} | {m.p99_ms:.2f} | {m.server_cpu_us:.0f} | {m.client_cpu_us:.0f} | {m.rejected} | {m.failed} "
        f"| {'' if share is None else f'{share:.0%}'} |"
    )


def cpu_rows(bound: LowerBound, measurements: list[Measurement]) -> Iterator[str]:
    """Markdown: CPU time of the service in closed loops of one process."""
    yield "| CPU us an image | parse | decode | network alone | other |\n| --- | ---: | ---: | ---: | ---: |"
    for each in measurements:
        if each.load.concurrency and "workers" not in each.load.request:
            split = " | ".join(f"{us:.0f}" for us in bound.cpu_split(each))
            yield f"| {each.load.request}, {each.load.images}; {each.load} | {split} |"


def summary(benchmark: Benchmark, bound: LowerBound) -> str:
    memory = " to ".join(f"{mb:.0f}" for mb in benchmark.memory_mb)
    return (
        f"Bounds: {bound.p50_ms():.2f} ms for a lone client, {bound.images_per_s(1):.0f} images/s for requests of one "
        f"image, {bound.images_per_s(IMAGES_PER_BULK_REQUEST):.0f} for bulk requests.\n"
        f"Ready after {benchmark.ready_s:.2f} s; {memory} MB resident."
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, help="CIFAR-10 folder with the images [the examples]")
    parser.add_argument("--seconds", type=float, default=4.0, help="of each measurement, after as long a warm-up [4]")
    parser.add_argument("--port", type=int, default=18099)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "bench.json")
    arguments = parser.parse_args()
    raise_descriptor_limit()  # the open loop opens a connection per request in flight
    files = image_files(arguments.data)
    benchmark = Benchmark(files, arguments.seconds, arguments.port)
    bound, measurements = run(benchmark, component_costs(files))
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(report(benchmark, bound, measurements), indent=1))
    print(
        "", *cpu_rows(bound, measurements), "", components.table(bound.costs), "", summary(benchmark, bound), sep="\n"
    )
    print(f"JSON in {arguments.out}")


if __name__ == "__main__":
    main()
