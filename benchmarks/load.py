"""A load generator for one HTTP address on loopback: closed loop, or open loop at a fixed rate.

Requests are bytes made beforehand, so that the generator takes little from the cores it shares with the service. In the
open loop a request's latency counts from the moment it was due, not from when it was sent: a service that stalls cannot
hide it (no coordinated omission).
"""

import asyncio
import time
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import cycle
from math import inf
from typing import cast

import numpy as np


@dataclass
class Run:
    """Latencies in seconds of the answered requests, by status, over `seconds` of measuring."""

    seconds: float = 0.0
    statuses: Counter[int] = field(default_factory=Counter)
    latencies: list[float] = field(default_factory=list)
    retry_after: Counter[int] = field(default_factory=Counter)  # seconds that the refused were told
    failures: int = 0

    @property
    def rate(self) -> float:
        """Good answers a second."""
        return self.statuses[200] / self.seconds

    def percentile(self, share: float) -> float:
        """Milliseconds within which that share of the good answers came."""
        return float(np.quantile(self.latencies, share) * 1e3) if self.latencies else float("nan")


class Connection(asyncio.Protocol):
    """One keep-alive connection with one request at a time under way."""

    def __init__(self) -> None:
        self.closed = False
        self.retry_after = 0  # of the last answer
        self._buffer = b""
        self._answer: asyncio.Future[int] | None = None
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is none by name

    def connection_lost(self, error: Exception | None) -> None:
        self.closed = True
        if self._answer and not self._answer.done():
            self._answer.set_exception(error or ConnectionError("closed"))

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        head = self._buffer.find(b"\r\n\r\n")
        if head < 0:
            return
        if len(self._buffer) < head + 4 + self._number(b"\r\ncontent-length:", head):
            return
        self.retry_after = self._number(b"\r\nretry-after:", head)
        self.closed = b"\r\nconnection: close" in self._buffer[:head].lower()  # said, and soon done
        status, self._buffer = int(self._buffer[9:12]), b""
        if self._answer and not self._answer.done():
            self._answer.set_result(status)

    def _number(self, header: bytes, head: int) -> int:
        """The header's value, 0 where there is none."""
        place = self._buffer.lower().find(header, 0, head)
        begin = place + len(header)
        return int(self._buffer[begin : self._buffer.index(b"\r\n", begin)]) if place >= 0 else 0

    def send(self, data: bytes) -> None:
        """A request or a piece of one; from the first piece on its answer is awaited. Raises OSError once closed."""
        assert self._transport is not None
        if self.closed:
            raise ConnectionError("closed")
        self._answer = self._answer or asyncio.get_running_loop().create_future()
        self._transport.write(data)

    async def answer(self) -> int:
        """The status that what was sent is answered with; raises OSError where the connection ends before."""
        assert self._answer is not None
        try:
            return await self._answer
        finally:
            self._answer = None

    async def ask(self, request: bytes) -> int:
        self.send(request)
        return await self.answer()

    def close(self) -> None:
        if self._answer:
            self._answer.cancel()
        if self._transport:
            self._transport.close()


async def connect(port: int) -> Connection:
    _, connection = await asyncio.get_running_loop().create_connection(Connection, "127.0.0.1", port)
    return connection


async def closed_loop(port: int, requests: list[bytes], concurrency: int, seconds: float, warm_up_s: float) -> Run:
    """Each of `concurrency` connections sends its next request as soon as the last is answered."""
    run, source = Run(), cycle(requests)
    begin = time.perf_counter() + warm_up_s
    end = begin + seconds

    async def worker() -> None:
        connection = await connect(port)
        while (sent := time.perf_counter()) < end:
            if connection.closed:
                connection = await connect(port)
            await _count(run, connection, next(source), sent, begin, end)
        connection.close()

    await asyncio.gather(*(worker() for _ in range(concurrency)))
    run.seconds = seconds
    return run


async def open_loop(port: int, requests: list[bytes], rate: float, seconds: float, connections: int = 16_384) -> Run:
    """`rate` requests a second at even distances, whatever the answers do; those that find no connection wait."""
    run, source, idle = Run(), cycle(requests), deque[Connection]()
    slots = asyncio.Semaphore(connections)
    begin = time.perf_counter()

    async def send(due: float) -> None:
        async with slots:
            connection = next((one for one in _popped(idle) if not one.closed), None) or await connect(port)
            await _count(run, connection, next(source), due, begin, inf)
            if not connection.closed:
                idle.append(connection)

    tasks: set[asyncio.Task[None]] = set()
    for i in range(int(rate * seconds)):
        due = begin + i / rate
        if (early := due - time.perf_counter()) > 0:
            await asyncio.sleep(early)
        task = asyncio.create_task(send(due))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
    await asyncio.gather(*tasks)
    run.seconds = time.perf_counter() - begin
    for connection in idle:
        connection.close()
    return run


def _popped(idle: deque[Connection]) -> Iterator[Connection]:
    """The latest first; a service closes those that were idle for long."""
    while idle:
        yield idle.pop()


async def _count(run: Run, connection: Connection, request: bytes, since: float, begin: float, end: float) -> None:
    """Asks, and counts the answer if it came between `begin` and `end`."""
    try:
        status = await connection.ask(request)
    except OSError:
        run.failures += 1
        return
    now = time.perf_counter()
    if begin <= now < end:
        run.statuses[status] += 1
        if status == 200:
            run.latencies.append(now - since)
        if connection.retry_after:
            run.retry_after[connection.retry_after] += 1


def form(files: list[tuple[str, bytes]], path: str = "/predict") -> bytes:
    """An HTTP request that uploads the files as one multipart form."""
    body = b"".join(
        b'--BOUNDARY\r\nContent-Disposition: form-data; name="file"; filename="%s"\r\n'
        b"Content-Type: image/%s\r\n\r\n%s\r\n" % (name.encode(), name.rpartition(".")[2].encode(), data)
        for name, data in files
    )
    return post(body + b"--BOUNDARY--\r\n", "multipart/form-data; boundary=BOUNDARY", path)


def post(body: bytes, kind: str, path: str = "/predict") -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body
