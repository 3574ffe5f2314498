"""`make soak`: mixed traffic for a while; exits with 1 if a request is lost or wrong, or if memory leaks.

A request is lost if it was sent whole and got no response within LOST_AFTER_S. It is wrong if its status is neither the
expected one nor a rejection (429, 503, 504).
"""

import argparse
import asyncio
import os
import platform
import random
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple
from urllib.request import urlopen

import uvloop

from benchmarks.client import Connection, ConnectionPool, connect
from benchmarks.server_process import ServerProcess, running, service
from benchmarks.traffic import TrafficKind, traffic_kinds

LOST_AFTER_S = 60.0
REJECTIONS = (429, 503, 504)
WARM_UP_S = 30.0  # of the same traffic, before the first footprint
MAX_GROWTH_MB = 32.0  # allocators vary by less
SETTLE_S = 7.0  # from the last response to a footprint: this client's idle connections are closed


@dataclass
class Tally:
    sent: int = 0
    expected: int = 0
    rejected: int = 0
    wrong: list[int] = field(default_factory=list)
    lost: Counter[str] = field(default_factory=Counter)  # by cause
    slowest_s: float = 0.0

    def add(self, kind: TrafficKind, status: int, seconds: float) -> None:
        if status == kind.status:
            self.expected += status > 0
        elif status in REJECTIONS:
            self.rejected += 1
        else:
            self.wrong.append(status)
        if status:
            self.slowest_s = max(self.slowest_s, seconds)


class Soak:
    """Requests of random kinds, `rate` per second at even intervals, independent of the responses."""

    def __init__(self, kinds: list[TrafficKind], port: int, rate: float) -> None:
        self.tallies = {kind.name: Tally() for kind in kinds}
        self._kinds = kinds
        self._port = port
        self._rate = rate
        self._pool = ConnectionPool()

    async def run(self, seconds: float) -> None:
        weights = [kind.weight for kind in self._kinds]
        start, tasks = time.perf_counter(), set[asyncio.Task[None]]()
        for i in range(int(self._rate * seconds)):
            if (early := start + i / self._rate - time.perf_counter()) > 0:
                await asyncio.sleep(early)
            task = asyncio.create_task(self._send(random.choices(self._kinds, weights)[0]))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
        await asyncio.gather(*tasks)
        self._pool.close()

    async def _send(self, kind: TrafficKind) -> None:
        tally = self.tallies[kind.name]
        tally.sent += 1
        connection, age = await self._connection()
        start = time.perf_counter()
        try:
            status = await asyncio.wait_for(kind.behaviour(connection, random.choice(kind.requests)), LOST_AFTER_S)
        except OSError as error:  # includes TimeoutError
            tally.lost[f"{type(error).__name__} on a {age} connection"] += 1
            connection.close()
            return
        seconds = time.perf_counter() - start
        if status:
            self._pool.release(connection)
        tally.add(kind, status, seconds)

    async def _connection(self) -> tuple[Connection, str]:
        if connection := self._pool.acquire():
            return connection, "reused"
        return await connect(self._port), "new"


class Footprint(NamedTuple):
    memory_mb: float
    descriptors: int
    queue_size: int


def footprint(server: ServerProcess) -> Footprint:
    with urlopen(f"http://127.0.0.1:{server.port}/metrics", timeout=LOST_AFTER_S) as response:
        lines = response.read().decode().splitlines()
    queue_size = next(line for line in lines if line.startswith("thirtytwo_queue_size "))
    time.sleep(0.1)  # until this request's connection is closed
    return Footprint(server.memory_mb(), server.descriptors(), int(float(queue_size.split()[1])))


def violations(tallies: dict[str, Tally], before: Footprint, after: Footprint) -> list[str]:
    found = [f"lost: {name}: {dict(tally.lost)}" for name, tally in tallies.items() if tally.lost]
    found += [f"wrong statuses {set(tally.wrong)}: {name}" for name, tally in tallies.items() if tally.wrong]
    if after.memory_mb > before.memory_mb + MAX_GROWTH_MB:
        found.append(f"memory grew by {after.memory_mb - before.memory_mb:.0f} MB")
    if after.descriptors > before.descriptors:
        found.append(f"descriptors grew by {after.descriptors - before.descriptors}")
    if after.queue_size:
        found.append(f"{after.queue_size} images are left in the queue")
    return found


def table(kinds: list[TrafficKind], tallies: dict[str, Tally], before: Footprint, after: Footprint) -> str:
    """Markdown."""
    rows = [
        "| request | expected | sent | as expected | rejected | wrong | lost | slowest ms |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for kind in kinds:
        tally = tallies[kind.name]
        slowest = f"{tally.slowest_s * 1e3:.0f}" if tally.slowest_s else ""
        rows.append(f"| {kind.name} | {kind.status or 'none'} | {_counts(tally)} | {slowest} |")
    total = Tally(lost=Counter())
    for tally in tallies.values():
        total.sent, total.expected = total.sent + tally.sent, total.expected + tally.expected
        total.rejected, total.wrong = total.rejected + tally.rejected, total.wrong + tally.wrong
        total.lost += tally.lost
    rows += [
        f"| **total** | | {_counts(total)} | |",
        "",
        "| service | before | after |",
        "| --- | ---: | ---: |",
        f"| memory, MB | {before.memory_mb:.0f} | {after.memory_mb:.0f} |",
        f"| descriptors | {before.descriptors} | {after.descriptors} |",
        f"| images in the queue | {before.queue_size} | {after.queue_size} |",
    ]
    return "\n".join(rows)


def _counts(tally: Tally) -> str:
    return f"{tally.sent} | {tally.expected} | {tally.rejected} | {len(tally.wrong)} | {tally.lost.total()}"


def soak(server: ServerProcess, minutes: float, rate: float) -> tuple[str, list[str]]:
    """The table and the violations."""
    kinds = traffic_kinds()
    uvloop.run(Soak(kinds, server.port, rate).run(WARM_UP_S))
    time.sleep(SETTLE_S)
    before = footprint(server)
    measured = Soak(kinds, server.port, rate)
    uvloop.run(measured.run(60 * minutes))
    time.sleep(SETTLE_S)
    after = footprint(server)
    return table(kinds, measured.tallies, before, after), violations(measured.tallies, before, after)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=2.0, help="of traffic, after half a minute of warm-up [2]")
    parser.add_argument("--rate", type=float, default=40.0, help="requests per second [40]")
    parser.add_argument("--port", type=int, default=18098)
    parser.add_argument("--seed", type=int, default=0, help="of the order of the requests [0]")
    parser.add_argument("--out", type=Path, help="also write the report to this file")
    arguments = parser.parse_args()
    random.seed(arguments.seed)
    with running(service(arguments.port), arguments.port) as server:
        rows, found = soak(server, arguments.minutes, arguments.rate)
    head = f"{arguments.minutes:g} minutes, {arguments.rate:g} requests/s, {os.cpu_count()} CPUs, {platform.machine()}"
    text = "\n".join([head, "", rows, "", *(found or ["No violation."])])
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
