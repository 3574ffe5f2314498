"""`make overload`: several times as much work as the service can do, for a minute.

First its peak, closed loop; then an open loop at a multiple of that. Ends with 1 where the accepted work falls under
nine tenths of the peak, where anything is answered with another status than 200 or 429 or not at all, or where a
single request is not answered within a second of the end. Generator and service share the cores, in both loops.
"""

import argparse
import asyncio
import os
import platform
import sys
import time
from typing import NamedTuple

import uvloop

from app.__main__ import raise_descriptor_limit
from benchmarks.client import Run, closed_loop, connect, form, open_loop
from benchmarks.serving import Served, pictures, process, service

IMAGES = 16  # in a request: enough that the generator costs little beside the service
CALLERS = 32  # of the closed loop, with as many images as the queue holds
GOODPUT = 0.9
RECOVERY_S = 1.0


class Findings(NamedTuple):
    peak: Run
    over: Run
    offered: float  # requests a second
    recovery_s: float
    memory_mb: float
    memory_peak_mb: float


async def recovery(port: int, request: bytes, after_s: float) -> float:
    """Seconds from then on until one request is answered with 200."""
    await asyncio.sleep(after_s)
    begun = time.perf_counter()
    connection = await connect(port)
    while await connection.ask(request) != 200:
        await asyncio.sleep(0.01)
    connection.close()
    return time.perf_counter() - begun


def drive(served: Served, times: float, seconds: float) -> Findings:
    files = pictures(None)
    requests = [form(files[i : i + IMAGES]) for i in range(0, len(files), IMAGES)]
    peak = uvloop.run(closed_loop(served.port, requests, CALLERS, seconds / 6, warm_up_s=5.0))
    before, rate = served.memory_mb(), times * peak.rate

    async def both() -> tuple[Run, float]:
        return await asyncio.gather(
            open_loop(served.port, requests, rate, seconds),
            recovery(served.port, form(files[:1]), seconds),
        )

    over, recovery_s = uvloop.run(both())
    return Findings(peak, over, rate, recovery_s, before, served.memory_mb("VmHWM"))


def table(found: Findings, times: float) -> str:
    told = sorted(found.over.retry_after.elements())
    retry = f"{told[0]} to {told[-1]}, mostly {found.over.retry_after.most_common(1)[0][0]}" if told else ""
    rows = [
        "| load | offered images/s | answered images/s | of the peak | 200 | 429 | other | lost | p50 ms | p99 ms | "
        "Retry-After, s |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for load, run, offered, hint in (
        (f"closed loop, {CALLERS} callers", found.peak, found.peak.rate, ""),
        (f"{times:g} times that", found.over, found.offered, retry),
    ):
        other = sum(run.statuses.values()) - run.statuses[200] - run.statuses[429]
        rows.append(
            f"| {load} | {offered * IMAGES:.0f} | {run.rate * IMAGES:.0f} | {run.rate / found.peak.rate:.2f} | "
            f"{run.statuses[200]} | {run.statuses[429]} | {other} | {run.failures} | {run.percentile(0.5):.0f} | "
            f"{run.percentile(0.99):.0f} | {hint} |"
        )
    rows += [
        "",
        f"Memory {found.memory_mb:.0f} MB before, at most {found.memory_peak_mb:.0f} MB. A single request sent at the "
        f"end of the load was answered with 200 after {found.recovery_s:.2f} s.",
    ]
    return "\n".join(rows)


def faults(found: Findings) -> list[str]:
    wrong = []
    if found.over.rate < GOODPUT * found.peak.rate:
        wrong.append(f"goodput fell to {found.over.rate / found.peak.rate:.2f} of the peak")
    if found.over.failures or set(found.over.statuses) - {200, 429}:
        wrong.append(f"{found.over.failures} lost, statuses {sorted(found.over.statuses)}")
    if found.over.statuses[429] != found.over.retry_after.total():
        wrong.append("a 429 without Retry-After")
    if found.recovery_s > RECOVERY_S:
        wrong.append(f"recovery took {found.recovery_s:.2f} s")
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.overload", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--times", type=float, default=4.0, help="the peak [4]")
    parser.add_argument("--seconds", type=float, default=60.0, help="of the overload; the peak takes a sixth [60]")
    parser.add_argument("--port", type=int, default=18097)
    parser.add_argument("flags", nargs="*", help="of the service, after --, such as -- --max-queue 512")
    arguments = parser.parse_args()
    raise_descriptor_limit()
    with process(service(arguments.port, *arguments.flags), arguments.port, "/readyz") as served:
        found = drive(served, arguments.times, arguments.seconds)
    wrong = faults(found)
    print(f"{arguments.seconds:g} s, {IMAGES} images a request, {os.cpu_count()} CPUs, {platform.machine()}\n")
    print(table(found, arguments.times), "", *(wrong or ["Every promise was kept."]), sep="\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
