"""Load on one address: closed loop, or open loop at a fixed rate.

In the open loop a request's latency counts from its due time, not from when it is sent, so a stalled service cannot
hide it (no coordinated omission).
"""

import asyncio
import time
from collections import Counter, deque
from dataclasses import dataclass, field
from functools import partial
from itertools import cycle

import numpy as np

from benchmarks.client import Connection, ConnectionPool, connect, exchange


@dataclass
class LoadResult:
    """Latencies in seconds of responses with status 200, and responses by status, over `seconds`.

    `ends` has the time.perf_counter at which each of the latencies ended.
    """

    seconds: float = 0.0
    statuses: Counter[int] = field(default_factory=Counter)
    latencies: list[float] = field(default_factory=list)
    ends: list[float] = field(default_factory=list)
    retry_after: Counter[int] = field(default_factory=Counter)  # seconds, of each response that has the header
    failures: int = 0  # requests without a response

    @property
    def rate(self) -> float:
        """Responses with status 200 per second."""
        return self.statuses[200] / self.seconds

    def percentile_ms(self, share: float) -> float:
        """The quantile of the latencies, NaN if there is none."""
        return float(np.quantile(self.latencies, share) * 1e3) if self.latencies else float("nan")

    def add(self, connection: Connection, status: int, latency_s: float) -> None:
        if not status:
            self.failures += 1
            return
        self.statuses[status] += 1
        if status == 200:
            self.latencies.append(latency_s)
            self.ends.append(time.perf_counter())
        if connection.retry_after:
            self.retry_after[connection.retry_after] += 1


async def closed_loop(
    port: int, requests: list[bytes], concurrency: int, seconds: float, warm_up_s: float
) -> LoadResult:
    """`concurrency` connections; each sends its next request after the response."""
    result, source = LoadResult(seconds), cycle(requests)
    start = time.perf_counter() + warm_up_s
    end = start + seconds

    async def client() -> None:
        connection = await connect(port)
        while (sent := time.perf_counter()) < end:
            connection, status = await exchange(port, connection, next(source))
            now = time.perf_counter()
            if start <= now < end or not status:
                result.add(connection, status, now - sent)
        connection.close()

    await asyncio.gather(*(client() for _ in range(concurrency)))
    return result


async def open_loop(
    port: int, requests: list[bytes], rate: float, seconds: float, connections: int = 16_384
) -> LoadResult:
    """`rate` requests per second at even intervals; at most `connections` are in flight, further ones wait."""
    return await _OpenLoop(port, requests, connections).run(int(rate * seconds), 1 / rate)


class _OpenLoop:
    """Uses callbacks instead of tasks: the generator shares the cores with the service it overloads."""

    def __init__(self, port: int, requests: list[bytes], connections: int) -> None:
        self._port = port
        self._source = cycle(requests)
        self._free = connections
        self._pool = ConnectionPool()
        self._overdue: deque[float] = deque()  # due times of requests that wait for a connection
        self._opening: set[asyncio.Task[None]] = set()
        self._remaining = 0
        self._completed = asyncio.Event()
        self._result = LoadResult()

    async def run(self, count: int, interval_s: float) -> LoadResult:
        start, self._remaining = time.perf_counter(), count
        for i in range(count):
            due = start + i * interval_s
            if (early := due - time.perf_counter()) > 0:
                await asyncio.sleep(early)
            self._start(due)
        if self._remaining:
            await self._completed.wait()
        self._result.seconds = time.perf_counter() - start
        self._pool.close()
        return self._result

    def _start(self, due: float) -> None:
        if not self._free:
            self._overdue.append(due)
            return
        self._free -= 1
        if connection := self._pool.acquire():
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
        connection.call(next(self._source), partial(self._complete, connection, due))

    def _complete(self, connection: Connection, due: float, status: int) -> None:
        self._result.add(connection, status, time.perf_counter() - due)
        self._free += 1
        self._remaining -= 1
        if not self._remaining:
            self._completed.set()
        self._pool.release(connection)
        if self._overdue:
            self._start(self._overdue.popleft())
