"""The load generator against a server with prepared responses."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from itertools import count

import pytest

from benchmarks.client import ConnectionPool, connect
from benchmarks.load import closed_loop, open_loop

pytestmark = pytest.mark.anyio

REQUEST = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
BUSY = b"HTTP/1.1 429 Too Many Requests\r\nRetry-After: 3\r\nContent-Length: 0\r\n\r\n"
LAST = b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"


@asynccontextmanager
async def server(respond: Callable[[int], bytes]) -> AsyncIterator[int]:
    """Its port. `respond` gets the number of the request; no bytes close the connection."""
    numbers = count()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while await reader.readuntil(b"\r\n\r\n"):
                response = respond(next(numbers))
                if not response:
                    break
                writer.write(response)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    listening = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with listening:
        yield listening.sockets[0].getsockname()[1]


async def test_closed_loop_counts_by_status() -> None:
    async with server(lambda number: BUSY if number % 2 else OK) as port:
        result = await closed_loop(port, [REQUEST], concurrency=1, seconds=1, warm_up_s=0)
    assert abs(result.statuses[200] - result.statuses[429]) <= 1
    assert result.retry_after == {3: result.statuses[429]}
    assert len(result.latencies) == result.statuses[200] > 0
    assert result.rate == result.statuses[200]
    assert result.failures == 0


async def test_closed_connections_are_failures_and_reopened() -> None:
    async with server(lambda number: b"" if number == 1 else OK) as port:
        result = await closed_loop(port, [REQUEST], concurrency=1, seconds=1, warm_up_s=0)
    assert result.failures == 1
    assert result.statuses[200] > 1


async def test_open_loop_sends_every_request() -> None:
    async with server(lambda number: LAST if number % 3 == 0 else OK) as port:
        result = await open_loop(port, [REQUEST], rate=500, seconds=0.2)
    assert result.statuses == {200: 100}


async def test_open_loop_latency_includes_the_wait_for_a_connection() -> None:
    async with server(lambda number: OK) as port:
        result = await open_loop(port, [REQUEST], rate=1000, seconds=0.05, connections=1)
    assert result.statuses == {200: 50}
    assert all(latency > 0 for latency in result.latencies)


async def test_response_in_parts_is_read_to_its_end() -> None:
    async with server(lambda number: OK) as port:
        connection = await connect(port)
        for part in (REQUEST[:5], REQUEST[5:]):
            connection.send(part)
        assert await connection.status() == 200
        assert await connection.exchange(REQUEST) == 200
        connection.close()


async def test_pool_returns_open_connections_only() -> None:
    pool = ConnectionPool()
    async with server(lambda number: LAST) as port:
        connection = await connect(port)
        pool.release(connection)
        assert pool.acquire() is connection
        await connection.exchange(REQUEST)
        pool.release(connection)
        assert pool.acquire() is None


async def test_sending_on_a_closed_connection_raises() -> None:
    async with server(lambda number: LAST) as port:
        connection = await connect(port)
        await connection.exchange(REQUEST)
        with pytest.raises(ConnectionError):
            connection.send(REQUEST)
