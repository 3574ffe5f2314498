"""A load generator for one HTTP address on loopback: closed loop, or open loop at a fixed rate.

Requests are bytes made beforehand, so that the generator takes little from the cores it shares with the service. In the
open loop a request's latency counts from the moment it was due, not from when it was sent: a service that stalls cannot
hide it (no coordinated omission).
"""

import asyncio
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import cycle
from typing import cast

import numpy as np

STALE_S = 2.0  # the service closes idle connections after 5 s; one that is about to be closed is no loss of a request


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
        self._told: Callable[[int], None] | None = None
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is none by name

    def connection_lost(self, error: Exception | None) -> None:
        self.closed = True
        self._tell(0)

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        head = self._buffer.find(b"\r\n\r\n")
        if head < 0:
            return
        names = self._buffer[:head].lower()
        if len(self._buffer) < head + 4 + _number(names, b"\r\ncontent-length:"):
            return
        self.retry_after = _number(names, b"\r\nretry-after:")
        self.closed = b"\r\nconnection: close" in names  # said, and soon done
        status, self._buffer = int(self._buffer[9:12]), b""
        self._tell(status)

    def _tell(self, status: int) -> None:
        told, self._told = self._told, None
        if told:
            told(status)

    def call(self, request: bytes, told: Callable[[int], None]) -> None:
        """Sends a request; `told` gets the status of its answer, or 0 where the connection ends before."""
        self._told = told
        if self.closed:
            self._tell(0)
        else:
            assert self._transport is not None
            self._transport.write(request)

    def send(self, data: bytes) -> None:
        """A request or a piece of one; from the first piece on its answer is awaited. Raises OSError once closed."""
        assert self._transport is not None
        if self.closed:
            raise ConnectionError("closed")
        if self._answer is None:
            self._answer = asyncio.get_running_loop().create_future()
            self._told = partial(_settle, self._answer)
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


def _settle(answer: asyncio.Future[int], status: int) -> None:
    if answer.done():
        return  # nobody waits any more
    if status:
        answer.set_result(status)
    else:
        answer.set_exception(ConnectionError("closed"))


def _number(names: bytes, header: bytes) -> int:
    """The value of a header in a head in lower case, 0 where there is none."""
    _, found, rest = names.partition(header)
    return int(rest.partition(b"\r\n")[0]) if found else 0


async def connect(port: int) -> Connection:
    _, connection = await asyncio.get_running_loop().create_connection(Connection, "127.0.0.1", port)
    return connection


class Idle:
    """Connections that wait for their next request; the latest is taken first, and none that was idle for long."""

    def __init__(self) -> None:
        self._kept: deque[tuple[float, Connection]] = deque()

    def add(self, connection: Connection) -> None:
        if not connection.closed:
            self._kept.append((time.perf_counter(), connection))

    def take(self) -> Connection | None:
        while self._kept:
            since, connection = self._kept.pop()
            if not connection.closed and time.perf_counter() - since < STALE_S:
                return connection
            connection.close()
        return None

    def close(self) -> None:
        for _, connection in self._kept:
            connection.close()


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
            try:
                status = await connection.ask(next(source))
            except OSError:
                status = 0
            now = time.perf_counter()
            if begin <= now < end or not status:
                _count(run, connection, status, now - sent)
        connection.close()

    await asyncio.gather(*(worker() for _ in range(concurrency)))
    run.seconds = seconds
    return run


async def open_loop(port: int, requests: list[bytes], rate: float, seconds: float, connections: int = 16_384) -> Run:
    """`rate` requests a second at even distances, whatever the answers do; those that find no connection wait."""
    return await OpenLoop(port, requests, connections).run(int(rate * seconds), 1 / rate)


class OpenLoop:
    """Calls in place of tasks: at twice what a service can do, the generator's cost tells in what the service does."""

    def __init__(self, port: int, requests: list[bytes], connections: int) -> None:
        self._port = port
        self._source = cycle(requests)
        self._slots = connections  # requests that may still be under way at once
        self._idle = Idle()
        self._waiting: deque[float] = deque()  # when those were due that find no slot
        self._opening: set[asyncio.Task[None]] = set()
        self._left = 0
        self._ended = asyncio.Event()
        self._run = Run()

    async def run(self, count: int, distance_s: float) -> Run:
        begin, self._left = time.perf_counter(), count
        for i in range(count):
            due = begin + i * distance_s
            if (early := due - time.perf_counter()) > 0:
                await asyncio.sleep(early)
            self._start(due)
        if self._left:
            await self._ended.wait()
        self._run.seconds = time.perf_counter() - begin
        self._idle.close()
        return self._run

    def _start(self, due: float) -> None:
        if not self._slots:
            self._waiting.append(due)
            return
        self._slots -= 1
        if connection := self._idle.take():
            self._send(connection, due)
        else:
            task = asyncio.create_task(self._open(due))
            self._opening.add(task)
            task.add_done_callback(self._opening.discard)

    async def _open(self, due: float) -> None:
        try:
            connection = await connect(self._port)
        except OSError:
            connection = Connection()
            connection.closed = True
        self._send(connection, due)

    def _send(self, connection: Connection, due: float) -> None:
        connection.call(next(self._source), partial(self._answered, connection, due))

    def _answered(self, connection: Connection, due: float, status: int) -> None:
        _count(self._run, connection, status, time.perf_counter() - due)
        self._slots += 1
        self._left -= 1
        if not self._left:
            self._ended.set()
        self._idle.add(connection)
        if self._waiting:
            self._start(self._waiting.popleft())


def _count(run: Run, connection: Connection, status: int, latency: float) -> None:
    if not status:
        run.failures += 1
        return
    run.statuses[status] += 1
    if status == 200:
        run.latencies.append(latency)
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
