"""A minimal HTTP/1.1 client for loopback: requests are bytes, responses are statuses.

wrk and oha are not installable with pip, and `make bench` runs without root. A request costs this client about 13 us
of CPU, 2 % of the service's; soak and overload need its slow and disconnecting senders, which those tools lack.
"""

import asyncio
import resource
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import cast

REUSE_WITHIN_S = 2.0  # below the service's keep-alive timeout, so that no request meets a closing connection


class Connection(asyncio.Protocol):
    """One keep-alive connection with at most one request in flight."""

    def __init__(self) -> None:
        self.closed = False
        self.retry_after = 0  # seconds, of the last response
        self._buffer = b""
        self._response: asyncio.Future[int] | None = None
        self._on_status: Callable[[int], None] | None = None
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's does not inherit from it

    def connection_lost(self, error: Exception | None) -> None:
        self.closed = True
        self._notify(0)

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        head = self._buffer.find(b"\r\n\r\n")
        if head < 0:
            return
        headers = self._buffer[:head].lower()
        if len(self._buffer) < head + 4 + _number(headers, b"\r\ncontent-length:"):
            return
        self.retry_after = _number(headers, b"\r\nretry-after:")
        self.closed = b"\r\nconnection: close" in headers
        status, self._buffer = int(self._buffer[9:12]), b""
        self._notify(status)

    def _notify(self, status: int) -> None:
        on_status, self._on_status = self._on_status, None
        if on_status:
            on_status(status)

    def call(self, request: bytes, on_status: Callable[[int], None]) -> None:
        """Sends a request; `on_status` gets the response's status, or 0 if the connection closes before."""
        self._on_status = on_status
        if self.closed:
            self._notify(0)
        else:
            assert self._transport is not None
            self._transport.write(request)

    def send(self, data: bytes) -> None:
        """Sends a request or a part of one. Raises OSError once closed."""
        assert self._transport is not None
        if self.closed:
            raise ConnectionError("closed")
        if self._response is None:
            self._response = asyncio.get_running_loop().create_future()
            self._on_status = partial(_resolve, self._response)
        self._transport.write(data)

    async def status(self) -> int:
        """The status of the response to what was sent. Raises OSError if the connection closes before."""
        assert self._response is not None
        try:
            return await self._response
        finally:
            self._response = None

    async def exchange(self, request: bytes) -> int:
        """Sends a request and returns the response's status."""
        self.send(request)
        return await self.status()

    def close(self) -> None:
        if self._response:
            self._response.cancel()
        if self._transport:
            self._transport.close()


def _resolve(response: asyncio.Future[int], status: int) -> None:
    if response.done():
        return  # cancelled
    if status:
        response.set_result(status)
    else:
        response.set_exception(ConnectionError("closed"))


def _number(headers: bytes, name: bytes) -> int:
    """The value of a header in a lower-case head, 0 if it is absent."""
    _, found, rest = headers.partition(name)
    return int(rest.partition(b"\r\n")[0]) if found else 0


async def connect(port: int) -> Connection:
    _, connection = await asyncio.get_running_loop().create_connection(Connection, "127.0.0.1", port)
    return connection


async def exchange(port: int, connection: Connection, request: bytes) -> tuple[Connection, int]:
    """Sends on the connection, or on a new one if it is closed. Returns that, and the status; 0 without a response."""
    if connection.closed:
        connection = await connect(port)
    try:
        return connection, await connection.exchange(request)
    except OSError:
        return connection, 0


class ConnectionPool:
    """Idle connections, last in first out."""

    def __init__(self) -> None:
        self._idle: deque[tuple[float, Connection]] = deque()

    def release(self, connection: Connection) -> None:
        if not connection.closed:
            self._idle.append((time.perf_counter(), connection))

    def acquire(self) -> Connection | None:
        """An open connection that was idle for less than REUSE_WITHIN_S."""
        while self._idle:
            since, connection = self._idle.pop()
            if not connection.closed and time.perf_counter() - since < REUSE_WITHIN_S:
                return connection
            connection.close()
        return None

    def close(self) -> None:
        for _, connection in self._idle:
            connection.close()


def raise_descriptor_limit() -> None:
    """Allows this process as many open connections as the system does."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
