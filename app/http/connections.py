"""What the connections of one process share: the ceiling of the bytes in flight, and the sweep of their timeouts."""

import logging
import math
import threading
from asyncio import AbstractEventLoop
from collections.abc import Callable, Iterable
from typing import Protocol

from starlette.types import Scope

from app import memory
from app.errors import RequestError

SMALL_REQUEST_BYTES = 65_536
SWEEP_S = 1.0
SWEPT_AT_ONCE = 100  # connections: some milliseconds if all of them are closed
TRIM_BYTES = 50_000_000  # in flight, after which memory is returned to the system

Headers = list[tuple[bytes, bytes]]
RenderError = Callable[[RequestError, Scope | None], tuple[Headers, bytes]]

logger = logging.getLogger(__name__)


class Connection(Protocol):
    def check_timeouts(self, now: float) -> None:
        """Closes the connection if one of its timeouts has passed. `now` is of the event loop's clock."""


class InflightBytes:
    """Bytes of requests that are not answered and of responses that are not read, over all connections.

    The last eighth of the limit is for requests of up to SMALL_REQUEST_BYTES: large uploads that do not finish must not
    block all other requests.
    """

    def __init__(self, limit: float = math.inf, return_memory: Callable[[], None] = memory.trim) -> None:
        self.used = 0
        self._return_memory = return_memory
        self._limit = limit
        self._limit_of_large = limit * 7 / 8
        self.peak = 0
        self._last_used = 0  # at the last call of `trim`

    def add(self, size: int) -> None:
        """A negative size releases."""
        self.used += size
        self.peak = max(self.peak, self.used)

    def exceeds(self, held: int) -> bool:
        """Whether the connection that holds `held` of the bytes is one too many."""
        if self.used <= self._limit_of_large:
            return False
        others = self.used - held
        return self.used > self._limit or (held > SMALL_REQUEST_BYTES and others > self._limit - self._limit_of_large)

    def trim(self) -> None:
        """Returns memory to the system after a peak, which the C allocator does not. Called about once a second."""
        is_falling, self._last_used = self.used < self._last_used, self.used
        if self.peak > TRIM_BYTES and self.used < self.peak // 4 and not is_falling:
            self.peak = self.used
            threading.Thread(target=self._return_memory, daemon=True).start()


class Connections:
    """Checks the timeouts of all open connections about once a second: a timer for each request costs more.

    `render_error` returns headers and body of an error's response, for the protocol to send. Without a scope, it also
    logs and counts the request, which could not be parsed.
    """

    def __init__(self, render_error: RenderError, limit: float = math.inf) -> None:
        self.render_error = render_error
        self.inflight = InflightBytes(limit)
        self._open: set[Connection] = set()
        self._sweeping = False

    def add(self, connection: Connection, loop: AbstractEventLoop, shortest_timeout_s: float) -> None:
        self._open.add(connection)
        if not self._sweeping:
            self._sweeping = True
            self._schedule(loop, min(SWEEP_S, shortest_timeout_s / 4))

    def discard(self, connection: Connection) -> None:
        self._open.discard(connection)

    def _schedule(self, loop: AbstractEventLoop, period_s: float) -> None:
        loop.call_later(period_s, self._sweep, loop, period_s)

    def _sweep(self, loop: AbstractEventLoop, period_s: float) -> None:
        connections = list(self._open)
        for start in range(0, len(connections), SWEPT_AT_ONCE):
            delay_s = period_s * start / len(connections)
            loop.call_later(delay_s, _check, connections[start : start + SWEPT_AT_ONCE], loop)
        self.inflight.trim()
        self._sweeping = bool(connections or self.inflight.peak > TRIM_BYTES)
        if self._sweeping:
            self._schedule(loop, period_s)


def render_text(error: RequestError, scope: Scope | None) -> tuple[Headers, bytes]:
    """For an application that renders no errors of its own."""
    return [(b"content-type", b"text/plain; charset=utf-8")], str(error).encode()


def _check(connections: Iterable[Connection], loop: AbstractEventLoop) -> None:
    now = loop.time()
    for connection in connections:
        connection.check_timeouts(now)
