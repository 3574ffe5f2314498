"""`make soak`: mixed traffic for a while, good, bad, large, slow and cancelled; tells what was lost or leaked.

A request is lost when it was sent whole and got no answer within LOST_AFTER_S. One with another status than its kind
must get is wrong. 429, 503 and 504 are refusals: answers, but counted apart. Ends with 1 where anything was lost, wrong
or leaked.
"""

import argparse
import asyncio
import io
import os
import platform
import random
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple
from urllib.request import urlopen

import uvloop
from PIL import Image

from benchmarks.client import Connection, Idle, connect, form, post
from benchmarks.serving import Served, pictures, process, service

LOST_AFTER_S = 60.0
REFUSALS = (429, 503, 504)
WARM_UP_S = 30.0  # of the same traffic, before memory and descriptors are looked at
MEMORY_MB = 32.0  # growth that the scatter of the allocators explains
HANDS_OFF_S = 7.0  # after the last answer, until the service has closed what was idle

Manner = Callable[[Connection, bytes], Awaitable[int]]


async def whole(connection: Connection, request: bytes) -> int:
    return await connection.ask(request)


async def slowly(connection: Connection, request: bytes) -> int:
    """In ten pieces over two seconds."""
    step = len(request) // 10 + 1
    for begin in range(0, len(request), step):
        connection.send(request[begin : begin + step])
        await asyncio.sleep(0.2)
    return await connection.answer()


async def leaving_early(connection: Connection, request: bytes) -> int:
    """Gone in mid-upload."""
    connection.send(request[: random.randrange(len(request))])
    await asyncio.sleep(random.random() * 0.1)
    connection.close()
    return 0


async def leaving_late(connection: Connection, request: bytes) -> int:
    """Gone while waiting for the answer."""
    connection.send(request)
    await asyncio.sleep(random.random() * 0.01)
    connection.close()
    return 0


class Kind(NamedTuple):
    """One sort of request: its share of a thousand, the status it must get (0: nobody waits for one), its manner."""

    name: str
    share: int
    status: int
    requests: list[bytes]
    manner: Manner = whole


@dataclass
class Count:
    sent: int = 0
    answered: int = 0
    refused: int = 0
    wrong: list[int] = field(default_factory=list)
    lost: Counter[str] = field(default_factory=Counter)  # by what ended them
    worst_s: float = 0.0


def kinds() -> list[Kind]:
    files = pictures(None)
    ones = [form([file]) for file in files]
    many = form(files[:64])
    bad = ("notes.txt", b"no picture at all")
    cut = [(name, data[: len(data) // 2]) for name, data in files]
    bomb = bytearray(_picture("BMP", (8, 8)))
    bomb[18:26] = (60_000).to_bytes(4, "little") * 2
    large = [post(_picture(kind, (2000, 1500)), "application/octet-stream") for kind in ("PNG", "JPEG", "WEBP")]
    over = post(b"", "image/png").replace(b"Content-Length: 0", b"Content-Length: 40000000")
    parts = ("/readyz", "/healthz", "/model", "/metrics", "/", "/openapi.json")
    return [
        Kind("one image, form", 380, 200, ones),
        Kind("one image, raw", 190, 200, [post(data, "application/octet-stream") for _, data in files]),
        Kind("64 images", 30, 200, [many]),
        Kind("256 images", 5, 200, [form(files)]),
        Kind("good among bad", 60, 200, [form([bad, file, broken]) for file, broken in zip(files, cut, strict=True)]),
        Kind("large image, 3 megapixels", 10, 200, large),
        Kind("slow sender, 2 s", 35, 200, ones, slowly),
        Kind("other paths", 60, 200, [f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode() for path in parts]),
        Kind("broken form", 30, 400, [form([file])[:-20] + b"x" * 20 for file in files]),
        Kind("body over the limit", 20, 413, [over]),
        Kind("pixel bomb", 30, 413, [post(bytes(bomb), "image/bmp"), form([("bomb.bmp", bytes(bomb))])]),
        Kind("no image", 30, 415, [form([bad]), post(b"{}", "application/json")]),
        Kind("cut-off image", 30, 422, [form([file]) for file in cut]),
        Kind("top_k out of range", 20, 422, [form([file], "/predict?top_k=11") for file in files]),
        Kind("gone in mid-upload", 35, 0, [*ones, many], leaving_early),
        Kind("gone in mid-wait", 35, 0, [*ones, many], leaving_late),
    ]


def _picture(kind: str, size: tuple[int, int]) -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise(size, 50).convert("RGB").save(buffer, kind)
    return buffer.getvalue()


class Soak:
    """Requests of the kinds in their shares, `rate` a second at even distances, whatever the answers do."""

    def __init__(self, kinds: list[Kind], port: int, rate: float) -> None:
        self.counts = {kind.name: Count() for kind in kinds}
        self._kinds = kinds
        self._port = port
        self._rate = rate
        self._idle = Idle()

    async def run(self, seconds: float) -> None:
        shares = [kind.share for kind in self._kinds]
        begin, tasks = time.perf_counter(), set[asyncio.Task[None]]()
        for i in range(int(self._rate * seconds)):
            if (early := begin + i / self._rate - time.perf_counter()) > 0:
                await asyncio.sleep(early)
            task = asyncio.create_task(self._send(random.choices(self._kinds, shares)[0]))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
        await asyncio.gather(*tasks)
        self._idle.close()

    async def _send(self, kind: Kind) -> None:
        count = self.counts[kind.name]
        count.sent += 1
        connection, age = await self._connection()
        sent = time.perf_counter()
        try:
            status = await asyncio.wait_for(kind.manner(connection, random.choice(kind.requests)), LOST_AFTER_S)
        except OSError as error:  # TimeoutError is one
            count.lost[f"{type(error).__name__} on a {age} connection"] += 1
            connection.close()
            return
        now = time.perf_counter()
        if status:
            self._idle.add(connection)
        _judge(count, kind, status, now - sent)

    async def _connection(self) -> tuple[Connection, str]:
        if connection := self._idle.take():
            return connection, "used"
        return await connect(self._port), "new"


def _judge(count: Count, kind: Kind, status: int, seconds: float) -> None:
    if status == kind.status:
        count.answered += status > 0
    elif status in REFUSALS:
        count.refused += 1
    else:
        count.wrong.append(status)
    if status:
        count.worst_s = max(count.worst_s, seconds)


class Footprint(NamedTuple):
    memory_mb: float
    descriptors: int
    queue: int


def footprint(served: Served) -> Footprint:
    with urlopen(f"http://127.0.0.1:{served.port}/metrics", timeout=LOST_AFTER_S) as response:
        lines = response.read().decode().splitlines()
    queue = next(line for line in lines if line.startswith("thirtytwo_queue_size "))
    time.sleep(0.1)  # until the connection of this question is gone
    return Footprint(served.memory_mb(), served.descriptors(), int(float(queue.split()[1])))


def faults(counts: dict[str, Count], start: Footprint, end: Footprint) -> list[str]:
    found = [f"lost: {name}: {dict(count.lost)}" for name, count in counts.items() if count.lost]
    found += [f"wrong statuses {set(count.wrong)}: {name}" for name, count in counts.items() if count.wrong]
    if end.memory_mb > start.memory_mb + MEMORY_MB:
        found.append(f"memory grew by {end.memory_mb - start.memory_mb:.0f} MB")
    if end.descriptors > start.descriptors:
        found.append(f"descriptors grew by {end.descriptors - start.descriptors}")
    if end.queue:
        found.append(f"{end.queue} images left in the queue")
    return found


def table(kinds: list[Kind], counts: dict[str, Count], start: Footprint, end: Footprint) -> str:
    rows = [
        "| request | must get | sent | answered so | refused | wrong | lost | worst ms |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for kind in kinds:
        c = counts[kind.name]
        worst = f"{c.worst_s * 1e3:.0f}" if c.worst_s else ""
        rows.append(
            f"| {kind.name} | {kind.status or 'nobody waits'} | {c.sent} | {c.answered} | {c.refused} | "
            f"{len(c.wrong)} | {c.lost.total()} | {worst} |"
        )
    all_of = counts.values()
    rows += [
        f"| **all** | | {sum(c.sent for c in all_of)} | {sum(c.answered for c in all_of)} | "
        f"{sum(c.refused for c in all_of)} | {sum(len(c.wrong) for c in all_of)} | "
        f"{sum(c.lost.total() for c in all_of)} | |",
        "",
        "| of the service | at start | at end |",
        "| --- | ---: | ---: |",
        f"| memory, MB | {start.memory_mb:.0f} | {end.memory_mb:.0f} |",
        f"| descriptors | {start.descriptors} | {end.descriptors} |",
        f"| images in the queue | {start.queue} | {end.queue} |",
    ]
    return "\n".join(rows)


def soak(served: Served, minutes: float, rate: float) -> tuple[str, list[str]]:
    """The table, and what is wrong."""
    every = kinds()
    warm_up = Soak(every, served.port, rate)
    uvloop.run(warm_up.run(WARM_UP_S))
    time.sleep(HANDS_OFF_S)
    start = footprint(served)
    run = Soak(every, served.port, rate)
    uvloop.run(run.run(60 * minutes))
    time.sleep(HANDS_OFF_S)
    end = footprint(served)
    return table(every, run.counts, start, end), faults(run.counts, start, end)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=2.0, help="of traffic, after half a minute of warm-up [2]")
    parser.add_argument("--rate", type=float, default=40.0, help="requests a second [40]")
    parser.add_argument("--port", type=int, default=18098)
    parser.add_argument("--seed", type=int, default=0, help="of the order of the requests [0]")
    parser.add_argument("--out", type=Path, help="file that the table is written to as well")
    arguments = parser.parse_args()
    random.seed(arguments.seed)
    with process(service(arguments.port), arguments.port, "/readyz") as served:
        shown, wrong = soak(served, arguments.minutes, arguments.rate)
    head = (
        f"{arguments.minutes:g} minutes at {arguments.rate:g} requests/s, {os.cpu_count()} CPUs, {platform.machine()}"
    )
    text = "\n".join([head, "", shown, "", *(wrong or ["Nothing lost, nothing wrong, nothing leaked."])])
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
