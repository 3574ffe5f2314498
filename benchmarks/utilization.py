"""The utilization that /metrics exports against the load that was offered, as shares of the measured peak.

    python -m benchmarks.utilization [--loads 0.3 0.5 0.7]

A closed loop measures the peak, then an open loop offers each share of it. A step is longer than the window of the
metric. Load generator and service share the cores.
"""

import argparse
import re
from collections.abc import Sequence
from typing import NamedTuple
from urllib.request import urlopen

import uvloop

from app.telemetry.capacity import PERIOD_S, WINDOW_S
from benchmarks.load import LoadResult, closed_loop, open_loop
from benchmarks.payloads import forms, image_files
from benchmarks.server_process import running, service

CLIENTS = 64
CAPACITY, UTILIZATION = "capacity_images_per_second", 'utilization_ratio{resource="engine"}'
COLUMNS = (
    "offered, of the peak",
    "engine utilization",
    "seconds of inference a second",
    "images a batch",
    "capacity, images/s",
    "p50 / p99 ms",
)
SAMPLE = re.compile(r'^thirtytwo_([a-z_]+(?:{resource="[a-z_]+"})?) (\S+)$', re.MULTILINE)


class Step(NamedTuple):
    """`load` is a share of the peak. The metrics are those after the step; the increases are over it."""

    load: float
    result: LoadResult
    metrics: dict[str, float]
    increases: dict[str, float]

    def row(self) -> str:
        batch = self.increases["batch_size_sum"] / self.increases["batch_size_count"]
        busy = self.increases["inference_seconds_sum"] / self.result.seconds
        times = f"{self.result.percentile_ms(0.5):.1f} / {self.result.percentile_ms(0.99):.1f}"
        shares = f"{self.load:.2f} | {self.metrics[UTILIZATION]:.2f} | {busy:.2f}"
        return f"| {shares} | {batch:.1f} | {self.metrics[CAPACITY]:.0f} | {times} |"


def read(port: int) -> dict[str, float]:
    """The samples of /metrics that have no label but the resource."""
    with urlopen(f"http://127.0.0.1:{port}/metrics") as response:
        return {name: float(value) for name, value in SAMPLE.findall(response.read().decode())}


def measure(port: int, loads: Sequence[float], seconds: float, peak_s: float) -> tuple[LoadResult, list[Step]]:
    requests = forms(image_files(None))
    peak = uvloop.run(closed_loop(port, requests, CLIENTS, peak_s, warm_up_s=peak_s / 5))
    steps = []
    for load in loads:
        before = read(port)
        result = uvloop.run(open_loop(port, requests, load * peak.rate, seconds))
        after = read(port)
        steps.append(Step(load, result, after, {name: after[name] - before.get(name, 0.0) for name in after}))
    return peak, steps


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.utilization", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--loads", type=float, nargs="+", default=[0.3, 0.5, 0.7], help="of the peak [0.3 0.5 0.7]")
    parser.add_argument("--seconds", type=float, default=WINDOW_S + PERIOD_S, help="of a step [%(default)g]")
    parser.add_argument("--peak-seconds", type=float, default=10.0, help="of the closed loop [%(default)g]")
    parser.add_argument("--port", type=int, default=8100, help="[%(default)s]")
    arguments = parser.parse_args(argv)
    with running(service(arguments.port), arguments.port):
        peak, steps = measure(arguments.port, arguments.loads, arguments.seconds, arguments.peak_seconds)
    print(
        f"peak: {peak.rate:.0f} requests/s", "", f"| {' | '.join(COLUMNS)} |", "| ---: " * len(COLUMNS) + "|", sep="\n"
    )
    print(*(step.row() for step in steps), sep="\n")


if __name__ == "__main__":
    main()
