"""`python -m benchmarks.hot_swap`: latency while new weights replace the running ones.

A closed loop of clients sends single images, while the weights file is replaced again and again and SIGHUP has it
loaded. Both files hold the same network, so that nothing but the loads differs. Exits with 1 if a request is lost or
gets another status than 200, or if the 99th percentile during a load is over twice that without. Load generator and
service share the cores.
"""

import argparse
import asyncio
import json
import os
import platform
import signal
import sys
import tempfile
import time
from itertools import cycle
from pathlib import Path
from typing import NamedTuple
from urllib.request import urlopen

import numpy as np
import uvloop

from app.model import weights
from benchmarks.load import LoadResult, closed_loop
from benchmarks.payloads import forms, image_files
from benchmarks.server_process import ServerProcess, running, service

MAX_RATIO = 2.0
HEADER = (
    "| clients | requests | not 200 | lost | loads | s per load | p50 ms | p99 ms | p99 ms in a load | ratio | "
    "memory, MB |\n| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- |"
)
SETTLE_S = 0.5  # after a load, before its successor and the measurement without a load


class Report(NamedTuple):
    """Latencies in ms; `loads` in seconds from the signal to the first response of the new version."""

    clients: int
    result: LoadResult
    quiet_ms: list[float]
    loading_ms: list[float]
    loads: list[float]
    memory_mb: tuple[float, float]

    @property
    def ratio(self) -> float:
        return p99(self.loading_ms) / p99(self.quiet_ms)


def p99(latencies: list[float]) -> float:
    return float(np.quantile(latencies, 0.99)) if latencies else float("nan")


def versions(folder: Path) -> list[Path]:
    """The bundled weights, and the same network with another card, hence another version."""
    bundled = weights.load(weights.BUNDLED)
    paths = [folder / name for name in ("first", "second")]
    for path in paths:
        card = bundled.card.model_copy(update={"recipe": {**bundled.card.recipe, "copy": path.name}})
        reference = bundled.reference_images, bundled.reference_probabilities, bundled.reference_stages
        weights.save(path, card, bundled.state, *reference)
    return paths


async def load_again(server: ServerProcess, path: Path, source: Path) -> tuple[float, float]:
    """Replaces the file; start and end of the load by time.perf_counter."""
    copy = path.with_name("copy")
    copy.write_bytes(source.read_bytes())
    copy.replace(path)
    expected = weights.load(source).version
    start = time.perf_counter()
    os.kill(server.pid, signal.SIGHUP)
    while await asyncio.to_thread(_version, server.port) != expected:
        await asyncio.sleep(0.02)
    return start, time.perf_counter()


def _version(port: int) -> str:
    with urlopen(f"http://127.0.0.1:{port}/model", timeout=30) as response:
        return str(json.load(response)["version"])


async def load_repeatedly(
    server: ServerProcess, path: Path, sources: list[Path], end: float
) -> list[tuple[float, float]]:
    spans = []
    for source in cycle(sources):
        await asyncio.sleep(SETTLE_S)
        spans.append(await load_again(server, path, source))
        if time.perf_counter() > end:
            return spans
    return spans


def measure(server: ServerProcess, path: Path, sources: list[Path], clients: int, seconds: float) -> Report:
    """Two closed loops: without loads, and with one load after the other."""
    requests = forms(image_files(None), 1)
    quiet = uvloop.run(closed_loop(server.port, requests, clients, seconds, warm_up_s=3.0))
    memory = server.memory_mb()

    async def loading() -> tuple[LoadResult, list[tuple[float, float]]]:
        end = time.perf_counter() + seconds
        return await asyncio.gather(
            closed_loop(server.port, requests, clients, seconds + 5.0, warm_up_s=0.0),
            load_repeatedly(server, path, sources, end),
        )

    result, spans = uvloop.run(loading())
    overlapping = [
        latency * 1e3
        for latency, end in zip(result.latencies, result.ends, strict=True)
        if any(start <= end and end - latency <= stop for start, stop in spans)
    ]
    time.sleep(1)
    result.statuses += quiet.statuses
    result.failures += quiet.failures
    durations = [stop - start for start, stop in spans]
    quiet_ms = [latency * 1e3 for latency in quiet.latencies]
    return Report(clients, result, quiet_ms, overlapping, durations, (memory, server.memory_mb()))


def row(report: Report) -> str:
    statuses = report.result.statuses
    return (
        f"| {report.clients} | {statuses.total()} | {statuses.total() - statuses[200]} | {report.result.failures} | "
        f"{len(report.loads)} | {np.median(report.loads):.2f} | {np.median(report.quiet_ms):.1f} | "
        f"{p99(report.quiet_ms):.1f} | {p99(report.loading_ms):.1f} | {report.ratio:.2f} | "
        f"{report.memory_mb[0]:.0f}, {report.memory_mb[1]:.0f} |"
    )


def violations(report: Report) -> list[str]:
    found = []
    if report.result.failures or set(report.result.statuses) - {200}:
        found.append(f"{report.result.failures} requests lost, statuses {sorted(report.result.statuses)}")
    if not report.ratio <= MAX_RATIO:
        found.append(f"with {report.clients} clients the 99th percentile is {report.ratio:.2f} times as high")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.hot_swap", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=15.0, help="without loads, and again with loads [15]")
    parser.add_argument("--clients", default="1,16,64", help="connections, comma-separated [1,16,64]")
    parser.add_argument("--port", type=int, default=18098)
    parser.add_argument("flags", nargs="*", help="of the service, after --")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        sources = versions(Path(folder))
        path = Path(folder) / "served"
        path.write_bytes(sources[-1].read_bytes())
        flags = ["--weights", str(path), "--weights-poll-s", "0", *arguments.flags]
        with running(service(arguments.port, *flags), arguments.port) as server:
            clients = [int(each) for each in arguments.clients.split(",")]
            reports = [measure(server, path, sources, each, arguments.seconds) for each in clients]
    print(f"{os.cpu_count()} CPUs, {platform.machine()}\n")
    print(HEADER)
    print(*map(row, reports), sep="\n")
    found = [violation for report in reports for violation in violations(report)]
    print("", *(found or ["No violation."]), sep="\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
