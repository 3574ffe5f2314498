"""The server's shutdown, which follows the drain: nothing outlasts it, and nobody is reset who can be answered."""

import asyncio
import json
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path

import pytest
from starlette.types import Receive, Scope, Send

from app.api.middleware import RequestContext
from app.http.http_protocol import Protocol
from app.telemetry.metrics import Metrics
from tests.support.raw_http import (
    TIMEOUT_S,
    connect,
    echo,
    port_of,
    read_to_end,
    request,
    respond,
    responses,
    serve,
)
from tests.support.subprocesses import process

pytestmark = pytest.mark.slow  # starts processes

HALF_BODY = request("/predict", bytes(100_000), "Content-Type: image/png\r\n")[:-50_000]
LARGE_FILES = request("/static/swagger/swagger-ui-bundle.js") * 20


@contextmanager
def dripping(connection: socket.socket) -> Iterator[None]:
    """Sends 8,000 bytes a second meanwhile, which no read timeout ends."""
    stop = threading.Event()

    def send() -> None:
        try:
            while not stop.wait(0.1):
                connection.sendall(bytes(800))
        except OSError:
            pass

    thread = threading.Thread(target=send)
    thread.start()
    yield
    stop.set()
    thread.join()


async def ignore(scope: Scope, receive: Receive, send: Send) -> None:
    """Never responds, whatever happens."""
    if scope["type"] == "lifespan":
        await echo(scope, receive, send)
    else:
        await asyncio.Event().wait()


async def large(scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] == "lifespan":
        await echo(scope, receive, send)
    else:
        await respond(send, bytes(30_000_000))


@pytest.mark.parametrize("sent", [b"", b"GET / HT", HALF_BODY, request("/")], ids=["idle", "head", "body", "done"])
def test_the_shutdown_ends_with_an_idle_client(sent: bytes) -> None:
    with ExitStack() as stack:
        server = stack.enter_context(serve(RequestContext(echo, Metrics(), None)))  # ends first, and checks that
        connection = connect(port_of(server))
        connection.sendall(sent)
        time.sleep(0.1)
        stack.close()
        connection.close()


def test_the_shutdown_ends_with_a_dripping_upload() -> None:
    with serve(RequestContext(echo, Metrics(), None)) as server:
        connection = connect(port_of(server))
        connection.sendall(request("/predict", headers="Content-Length: 9000000\r\n", method="POST"))
        drip = dripping(connection)
        drip.__enter__()
    drip.__exit__(None, None, None)
    connection.close()


def test_the_shutdown_ends_with_a_client_that_does_not_read() -> None:
    with serve(large) as server:
        connection = connect(port_of(server), receive_buffer=4096)
        connection.sendall(request("/") * 3)
        time.sleep(0.2)
    connection.close()


def test_the_shutdown_ends_with_a_request_that_does_not_end(caplog: pytest.LogCaptureFixture) -> None:
    metrics = Metrics()
    with serve(RequestContext(ignore, metrics, None), timeout_graceful_shutdown=2) as server:
        connection = connect(port_of(server))
        connection.sendall(request("/"))
        time.sleep(0.1)
    (response,) = responses(read_to_end(connection))
    connection.close()
    assert response.status == 503
    assert json.loads(response.body)["detail"] == "The service is shutting down."
    assert metrics.registry.get_sample_value("thirtytwo_requests_total", {"route": "unmatched", "status": "503"}) == 1
    assert "Exception in ASGI application" not in caplog.text


def test_a_request_in_progress_gets_its_response() -> None:
    started = threading.Event()

    async def slow(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            started.set()
            await asyncio.sleep(0.3)
        await echo(scope, receive, send)

    with serve(slow) as server:
        connection = connect(port_of(server))
        connection.sendall(request("/a"))
        assert started.wait(TIMEOUT_S)
    (response,) = responses(read_to_end(connection))
    connection.close()
    assert (response.body, response.headers["connection"]) == (b"GET /a ", "close")


def test_a_request_right_after_the_start_gets_its_response() -> None:
    """Its sender could not see the shutdown in time."""
    shutting_down = threading.Event()

    class Observed(Protocol):
        def shutdown(self) -> None:
            super().shutdown()
            shutting_down.set()

    with serve(echo, Observed) as server:
        connection = connect(port_of(server))
        connection.sendall(request("/a"))
        assert b"GET /a " in connection.recv(1000)
        server.should_exit = True
        assert shutting_down.wait(TIMEOUT_S)
        connection.sendall(request("/b"))
        (response,) = responses(read_to_end(connection))
    connection.close()
    assert (response.body, response.headers["connection"]) == (b"GET /b ", "close")


class Blocking(Protocol):
    """Blocks the event loop on a request for /block until the test releases it."""

    blocked = threading.Event()
    released = threading.Event()

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        if url == b"/block":
            Blocking.blocked.set()
            Blocking.released.wait(TIMEOUT_S)


def test_connections_in_the_backlog_get_their_responses() -> None:
    """The kernel has accepted them, the event loop has not."""
    with serve(echo, Blocking) as server:
        blocker = connect(port_of(server))
        blocker.sendall(request("/block"))
        assert Blocking.blocked.wait(TIMEOUT_S)
        waiting = [connect(port_of(server)) for _ in range(20)]
        for connection in waiting:
            connection.sendall(request("/a"))
        server.should_exit = True
        time.sleep(0.3)  # the server's next check of should_exit is due
        Blocking.released.set()
        received = [responses(read_to_end(connection)) for connection in waiting]
    for connection in (blocker, *waiting):
        connection.close()
    assert [[response.body for response in each] for each in received] == [[b"GET /a "]] * 20


def seconds_to_exit(running: subprocess.Popen[str]) -> float:
    start = time.monotonic()
    running.send_signal(signal.SIGTERM)
    assert running.wait(30) == 0
    return time.monotonic() - start


@pytest.mark.parametrize("drips", [False, True])
@pytest.mark.parametrize("sent", [HALF_BODY, LARGE_FILES], ids=["half a body", "unread responses"])
def test_process_exits_2_s_after_the_drain_at_most(tiny_weights: Path, sent: bytes, drips: bool) -> None:
    with (
        process(tiny_weights, "--shutdown-timeout-s", "4") as (running, url),
        connect(int(url.rpartition(":")[2]), receive_buffer=4096) as connection,
        dripping(connection) if drips else nullcontext(),
    ):
        connection.sendall(sent)
        time.sleep(0.5)
        assert seconds_to_exit(running) < 4 + 2
