"""Requests on a real socket: order, framing, limits, upgrades and half-closed connections."""

import asyncio
import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.types import Receive, Scope, Send

from app.api.middleware import RequestContext
from app.http.framing import without_upgrade
from app.http.http_protocol import Protocol
from app.http.sequential_protocol import MAX_BUFFERED_BYTES
from app.settings import Settings
from app.telemetry.metrics import Metrics
from tests.conftest import serving
from tests.support import logs
from tests.support.raw_http import (
    CLOSE,
    connect,
    echo,
    exchange,
    port_of,
    read_to_end,
    request,
    respond,
    responses,
    serve,
)

CHUNKED = "Transfer-Encoding: chunked\r\n"
H2C = "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAEAAEAAAAIAAAABAAMAAABkAAQB\r\n"


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    """Of the echo application."""
    with serve(RequestContext(echo, Metrics(), None)) as server:
        yield port_of(server)


def bodies(port: int, *packets: bytes) -> list[bytes]:
    return [response.body for response in exchange(port, *packets)]


# Order and framing


def test_a_response_does_not_wait_for_what_follows_it() -> None:
    received = threading.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await echo(scope, receive, send)
        if scope["type"] == "http":
            received.wait(10)  # holds the event loop

    with serve(app) as server, connect(port_of(server)) as connection:
        connection.settimeout(5)
        connection.sendall(request("/a"))
        assert connection.recv(1000).endswith(b"GET /a ")
        received.set()


def test_pipelined_requests_are_answered_in_order(port: int) -> None:
    sent = [request("/a"), request("/b", b"one"), request("/c", method="PUT"), request("/d", b"two", CLOSE)]
    assert bodies(port, b"".join(sent)) == [b"GET /a ", b"POST /b one", b"PUT /c ", b"POST /d two"]


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.sampled_from([b"", b"\r\n\r\n", b"GET /x HTTP/1.1\r\n\r\n", b"a" * 70_000, b"0\r\n\r\n"]), max_size=5),
    st.lists(st.integers(1, 300), min_size=1, max_size=5),
    st.booleans(),
)
def test_packets_do_not_change_the_requests(port: int, sent: list[bytes], sizes: list[int], chunked: bool) -> None:
    whole = b"".join(
        request(f"/{i}", headers=CHUNKED, method="POST") + chunks(body) if chunked else request(f"/{i}", body)
        for i, body in enumerate(sent)
    ) + request("/end", headers=CLOSE)
    with connect(port) as connection:
        position = 0
        for size in sizes:
            connection.sendall(whole[position : position + size])
            position += size
        connection.sendall(whole[position:])
        received = responses(read_to_end(connection))
    method = "POST" if chunked else None
    expected = [f"{method or ('POST' if body else 'GET')} /{i} ".encode() + body for i, body in enumerate(sent)]
    assert [response.body for response in received] == [*expected, b"GET /end "]


def chunks(body: bytes) -> bytes:
    """A chunked body of three chunks and an end, with an extension and a trailer."""
    third = len(body) // 3
    parts = [part for part in (body[:third], body[third : 2 * third], body[2 * third :]) if part]
    return b"".join(b"%x;a=b\r\n%b\r\n" % (len(part), part) for part in parts) + b"0\r\nTrailer: x\r\n\r\n"


def test_thousands_of_pipelined_requests_start_one_at_a_time() -> None:
    running, most = 0, 0

    async def count(scope: Scope, receive: Receive, send: Send) -> None:
        nonlocal running, most
        if scope["type"] == "lifespan":
            await echo(scope, receive, send)
            return
        running += 1
        most = max(most, running)
        await asyncio.sleep(0)
        await respond(send, b"")
        running -= 1

    with serve(count) as server, connect(port_of(server)) as connection:
        sender = threading.Thread(target=connection.sendall, args=(request("/") * 5000 + request("/", headers=CLOSE),))
        sender.start()
        assert read_to_end(connection).count(b"HTTP/1.1 200") == 5001
        sender.join()
    assert most == 1


class Recorded(Protocol):
    """Keeps the largest number of bytes that wait to be parsed."""

    most_buffered = 0

    def _parse(self) -> None:
        super()._parse()
        Recorded.most_buffered = max(Recorded.most_buffered, len(self._buffer) - self._position)


def test_one_byte_chunks_yield_to_other_callers() -> None:
    body = b"1\r\na\r\n" * 9_000 + b"0\r\n\r\n"
    with serve(RequestContext(echo, Metrics(), None), Recorded) as server:
        (response,) = exchange(port_of(server), request("/", headers=CHUNKED + CLOSE, method="POST") + body)
    assert response.body == b"POST / " + b"a" * 9_000
    assert Recorded.most_buffered > 0  # one iteration of the event loop does not parse them all
    assert Recorded.most_buffered < MAX_BUFFERED_BYTES + 256_001  # one read more


@pytest.mark.parametrize(
    "body",
    [b"1\r\na\r\n" * 60_000, b"1;" + b"a" * 300_000, b"0\r\n" + b"A: b\r\n" * 50_000],
    ids=["chunks", "extension", "trailers"],
)
def test_chunk_overhead_without_data_is_refused(port: int, body: bytes) -> None:
    (response,) = exchange(port, request("/", headers=CHUNKED, method="POST") + body)
    assert response.status == 400
    assert json.loads(response.body)["type"] == "urn:thirtytwo:problem:malformed-request"


def test_blanks_behind_a_value_are_no_part_of_it() -> None:
    seen: list[list[tuple[bytes, bytes]]] = []

    async def headers(scope: Scope, receive: Receive, send: Send) -> None:
        await echo(scope, receive, send)
        seen.append(scope.get("headers", []))

    chunked = request("/a", headers="Transfer-Encoding: chunked \r\nX-API-Key: \t key \r\n", method="POST")
    with serve(headers) as server:
        first, second = exchange(port_of(server), chunked + chunks(b"abc") + request("/b", headers=CLOSE))
    assert (first.body, second.body) == (b"POST /a abc", b"GET /b ")
    assert dict(seen[0])[b"x-api-key"] == b"key"


def test_trailers_are_not_headers() -> None:
    seen: list[list[tuple[bytes, bytes]]] = []

    async def headers(scope: Scope, receive: Receive, send: Send) -> None:
        await echo(scope, receive, send)
        seen.append(scope.get("headers", []))

    with serve(headers) as server:
        exchange(port_of(server), request("/", headers=CHUNKED + CLOSE, method="POST") + chunks(b"abc"))
    assert b"trailer" not in dict(seen[0])


# Invalid requests


def test_a_request_before_garbage_gets_its_response(port: int) -> None:
    first, second = exchange(port, request("/a", b"body") + b"\x00garbage\r\n\r\n")
    assert first.body == b"POST /a body"
    assert second.status == 400


def test_a_chunked_request_before_garbage_gets_its_response(port: int) -> None:
    sent = request("/a", headers=CHUNKED, method="POST") + chunks(b"body") + b"\x00garbage\r\n\r\n"
    first, second = exchange(port, sent)
    assert first.body == b"POST /a body"
    assert second.status == 400


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),
        (b"GET / HTTP/9.9\r\n\r\n", 400),
        (b"GET /\x00 HTTP/1.1\r\nHost: x\r\n\r\n", 400),
        (b"CONNECT x:443 HTTP/1.1\r\nHost: x\r\n\r\n", 400),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
        (b"GET / HTTP/2.0\r\nHost: x\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n", 400),
        (b"GET / HTTP/1.0\r\nHost: x\r\nHost: y\r\n\r\n", 400),
        (request("/", headers="Transfer-Encoding: gzip, chunked\r\n", method="POST") + b"0\r\n\r\n", 400),
        (request("/", headers="Transfer-Encoding: identity\r\n", method="POST"), 400),
        (request("/" + "a" * 3000), 414),
        (b"GET / HTTP/1.1\r\nA: " + b"a" * 40_000 + b"\r\n\r\n", 431),
        (b"GET / HTTP/1.1\r\nA: " + b"a" * 40_000, 431),
        (b"GET / HTTP/1.1\r\nA: " + b"a" * 9_000 + b"\r\n\r\n", 431),
        (b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 101 + b"\r\n", 431),
        (b"GET / HTTP/1.1\r\n" + b"Expect: b\r\n" * 101 + b"\r\n", 431),
        (b"\r\n" * 20_000, 431),
    ],
)
@pytest.mark.parametrize("before", [b"", request("/")], ids=["first", "second"])
def test_an_invalid_request_gets_a_problem_document(port: int, before: bytes, sent: bytes, status: int) -> None:
    *_, response = exchange(port, before + sent)
    problem = json.loads(response.body)
    assert (response.status, problem["status"]) == (status, status)
    assert response.headers["content-type"] == "application/problem+json"
    assert response.headers["connection"] == "close"
    assert response.headers["x-request-id"] == problem["request_id"]
    assert response.headers["x-content-type-options"] == "nosniff"


def test_a_broken_chunked_body_is_answered_by_the_application(tiny_weights: Path) -> None:
    with serving(Settings(weights=tiny_weights, max_batch=1)) as client:
        sent = (
            request("/predict", headers=CHUNKED + "Content-Type: image/png\r\n", method="POST") + b"3\r\nabc\r\nzz\r\n"
        )
        (response,) = exchange(client.base_url.port or 0, sent)
        assert (response.status, response.headers["connection"]) == (400, "close")
        assert "malformed-request" in response.body.decode()
        assert 'thirtytwo_requests_total{route="/predict",status="400"} 1.0' in client.get("/metrics").text


def test_a_request_that_cannot_be_parsed_is_logged_and_counted(
    tiny_weights: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with serving(Settings(weights=tiny_weights, max_batch=1)) as client:
        (response,) = exchange(client.base_url.port or 0, b"\x00")
        assert 'thirtytwo_requests_total{route="unmatched",status="400"} 1.0' in client.get("/metrics").text
    request_id = response.headers["x-request-id"]
    (line,) = [line for line in logs.read(capfd).splitlines() if request_id in line]
    assert "INFO    - unmatched 400" in line


# Requests for another protocol


@pytest.mark.parametrize("in_two", [False, True])
@pytest.mark.parametrize("upgrade", [H2C, "Connection: upgrade\r\nUpgrade: websocket\r\n"])
def test_a_request_for_an_upgrade_keeps_its_body(port: int, upgrade: str, in_two: bool) -> None:
    inner = request("/smuggled")
    sent = request("/a", inner, upgrade)
    packets = [sent[: -len(inner)], inner] if in_two else [sent]
    first, second = exchange(port, *packets, request("/b", headers=CLOSE))
    assert (first.status, first.body) == (200, b"POST /a " + inner)
    assert second.body == b"GET /b "


def test_a_chunked_request_for_an_upgrade_keeps_its_body(port: int) -> None:
    sent = request("/a", headers=H2C + CHUNKED, method="POST") + chunks(b"abc") + request("/b", headers=H2C + CLOSE)
    assert bodies(port, sent + request("/never")) == [b"POST /a abc", b"GET /b "]


def test_only_the_upgrade_is_taken_from_the_headers() -> None:
    headers = [(b"connection", b"Upgrade, close, HTTP2-Settings"), (b"upgrade", b"h2c"), (b"host", b"x")]
    assert without_upgrade(headers) == [(b"host", b"x"), (b"connection", b"close")]


# Half-closed connections


@pytest.mark.parametrize("count", [1, 3])
def test_a_half_closed_connection_gets_its_responses(port: int, count: int) -> None:
    with connect(port) as connection:
        connection.sendall(request("/a", b"body") * count)
        connection.shutdown(socket.SHUT_WR)
        assert [response.body for response in responses(read_to_end(connection))] == [b"POST /a body"] * count


async def slow_echo(scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] == "http":
        await asyncio.sleep(1)
    await echo(scope, receive, send)


@pytest.mark.slow
def test_a_half_closed_connection_waits_for_a_slow_response() -> None:
    with serve(slow_echo) as server, connect(port_of(server)) as connection:
        connection.sendall(request("/a"))
        connection.shutdown(socket.SHUT_WR)
        *interim, final = responses(read_to_end(connection))
    assert {response.status for response in interim} == {100}
    assert final.body == b"GET /a "


@pytest.mark.slow
def test_a_client_of_http_1_0_gets_no_interim_response() -> None:
    with serve(slow_echo) as server, connect(port_of(server)) as connection:
        connection.sendall(b"GET /a HTTP/1.0\r\n\r\n")
        connection.shutdown(socket.SHUT_WR)
        assert [response.status for response in responses(read_to_end(connection))] == [200]


def test_expectation_of_http_1_0_is_ignored(port: int) -> None:
    head = b"POST /a HTTP/1.0\r\nExpect: 100-continue\r\nContent-Length: 1\r\n\r\n"
    assert [response.status for response in exchange(port, head + b"b")] == [200]


@pytest.mark.parametrize("sent", [b"", b"\r\n", b"GET /a HT", request("/a", b"body")[:-1]])
def test_an_end_of_file_without_a_request_closes(port: int, sent: bytes) -> None:
    with connect(port) as connection:
        connection.sendall(sent)
        connection.shutdown(socket.SHUT_WR)
        assert read_to_end(connection) == b""


async def hold(scope: Scope, receive: Receive, send: Send, left: threading.Event) -> None:
    if scope["type"] == "lifespan":
        await echo(scope, receive, send)
        return
    while (await receive())["type"] != "http.disconnect":
        pass
    left.set()


@pytest.mark.slow
def test_a_client_that_has_left_is_no_half_closed_connection() -> None:
    left = threading.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await hold(scope, receive, send, left)

    with serve(app) as server:
        with connect(port_of(server)) as connection:
            connection.sendall(request("/a"))
            time.sleep(0.1)
        assert left.wait(10)


def test_a_large_response_reaches_the_client(tiny_weights: Path) -> None:
    path = "/static/swagger/swagger-ui-bundle.js"
    with serving(Settings(weights=tiny_weights, max_batch=1)) as client:
        sent = request("/nowhere") + request(path) + request("/readyz", headers=CLOSE)
        received = exchange(client.base_url.port or 0, sent)
        size = len(client.get(path).content)
    assert [response.status for response in received] == [404, 200, 200]
    assert len(received[1].body) == size > 1_000_000


def test_hundreds_of_ranges_are_ignored(client: httpx.Client) -> None:
    ranges: Any = "bytes=" + ",".join(f"{2 * i}-{2 * i}" for i in range(500))
    response = client.get("/static/swagger/swagger-ui-bundle.js", headers={"range": ranges})
    assert response.status_code == 200
