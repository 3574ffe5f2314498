"""`make overload`: several times the service's peak load, for a minute.

A closed loop measures the peak, then an open loop offers a multiple of it. Exits with 1 if the goodput is below nine
tenths of the peak, if a request is lost or gets another status than 200 and 429, or if a single request after the
load takes over a second. Load generator and service share the cores in both loops.
"""

import argparse
import asyncio
import os
import platform
import sys
import time
from typing import NamedTuple

import uvloop

from benchmarks.client import connect, raise_descriptor_limit
from benchmarks.load import LoadResult, closed_loop, open_loop
from benchmarks.payloads import form, forms, image_files
from benchmarks.server_process import ServerProcess, running, service

IMAGES = 16  # per request: the load generator's cost is small beside the service's
CLIENTS = 32  # of the closed loop: as many images as the queue holds
MIN_GOODPUT = 0.9  # of the peak
MAX_RECOVERY_S = 1.0


class Report(NamedTuple):
    peak: LoadResult
    overload: LoadResult
    offered: float  # requests per second
    recovery_s: float
    memory_mb: float
    peak_memory_mb: float


async def recovery_s(port: int, request: bytes, after_s: float) -> float:
    """Waits `after_s`, then measures the seconds until a request gets status 200."""
    await asyncio.sleep(after_s)
    start = time.perf_counter()
    connection = await connect(port)
    while await connection.exchange(request) != 200:
        await asyncio.sleep(0.01)
    connection.close()
    return time.perf_counter() - start


def measure(server: ServerProcess, times: float, seconds: float) -> Report:
    files = image_files(None)
    requests = forms(files, IMAGES)
    peak = uvloop.run(closed_loop(server.port, requests, CLIENTS, seconds / 6, warm_up_s=5.0))
    memory, rate = server.memory_mb(), times * peak.rate

    async def overload() -> tuple[LoadResult, float]:
        return await asyncio.gather(
            open_loop(server.port, requests, rate, seconds),
            recovery_s(server.port, form(files[:1]), seconds),
        )

    result, recovery = uvloop.run(overload())
    return Report(peak, result, rate, recovery, memory, server.memory_mb("VmHWM"))


def table(report: Report, times: float) -> str:
    """Markdown."""
    hints = sorted(report.overload.retry_after.elements())
    most_common = report.overload.retry_after.most_common(1)
    retry = f"{hints[0]} to {hints[-1]}, mostly {most_common[0][0]}" if hints else ""
    return "\n".join(
        [
            "| load | offered images/s | images/s | share of the peak | 200 | 429 | other | lost | p50 ms | p99 ms | "
            "Retry-After, s |",
            "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
            _row(f"closed loop, {CLIENTS} clients", report.peak, report.peak.rate, report, ""),
            _row(f"{times:g} times the peak", report.overload, report.offered, report, retry),
            "",
            f"Memory {report.memory_mb:.0f} MB before, at most {report.peak_memory_mb:.0f} MB. A single request after "
            f"the load got status 200 in {report.recovery_s:.2f} s.",
        ]
    )


def _row(load: str, result: LoadResult, offered: float, report: Report, retry: str) -> str:
    statuses = result.statuses
    other = statuses.total() - statuses[200] - statuses[429]
    return (
        f"| {load} | {offered * IMAGES:.0f} | {result.rate * IMAGES:.0f} | {result.rate / report.peak.rate:.2f} | "
        f"{statuses[200]} | {statuses[429]} | {other} | {result.failures} | {result.percentile_ms(0.5):.0f} | "
        f"{result.percentile_ms(0.99):.0f} | {retry} |"
    )


def violations(report: Report) -> list[str]:
    found, overload = [], report.overload
    if overload.rate < MIN_GOODPUT * report.peak.rate:
        found.append(f"goodput fell to {overload.rate / report.peak.rate:.2f} of the peak")
    if overload.failures or set(overload.statuses) - {200, 429}:
        found.append(f"{overload.failures} requests lost, statuses {sorted(overload.statuses)}")
    if overload.statuses[429] != overload.retry_after.total():
        found.append("a 429 without Retry-After")
    if report.recovery_s > MAX_RECOVERY_S:
        found.append(f"recovery took {report.recovery_s:.2f} s")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.overload", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--times", type=float, default=4.0, help="multiple of the peak [4]")
    parser.add_argument("--seconds", type=float, default=60.0, help="of the overload; the peak takes a sixth [60]")
    parser.add_argument("--port", type=int, default=18097)
    parser.add_argument("flags", nargs="*", help="of the service, after --, such as -- --max-queue 512")
    arguments = parser.parse_args()
    raise_descriptor_limit()
    flags = ["--max-queue-share", "1", *arguments.flags]  # all load is from one address
    with running(service(arguments.port, *flags), arguments.port) as server:
        report = measure(server, arguments.times, arguments.seconds)
    found = violations(report)
    print(f"{arguments.seconds:g} s, {IMAGES} images per request, {os.cpu_count()} CPUs, {platform.machine()}\n")
    print(table(report, arguments.times), "", *(found or ["No violation."]), sep="\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
