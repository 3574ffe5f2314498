"""Slow, endless and vanishing callers."""

import os
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import httpx
import pytest

from app.protocol import Protocol
from app.settings import Settings
from tests.conftest import serving

HEAD = b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: 2400\r\n\r\n"


class Impatient(Protocol):
    patience_s = 0.5


@pytest.fixture(scope="module")
def service(tiny_weights: Path) -> Iterator[httpx.Client]:
    with serving(Settings(weights=tiny_weights, max_batch=8), protocol=Impatient) as client:
        yield client


def connect(client: httpx.Client) -> socket.socket:
    return socket.create_connection(("127.0.0.1", client.base_url.port or 0), timeout=10)


def is_closed(connection: socket.socket) -> bool:
    """Whether the other side ends the connection within the socket's time-out."""
    try:
        while connection.recv(4096):
            pass
    except ConnectionResetError:
        pass
    return True


@pytest.mark.parametrize("start", [b"", b"POST /pre", HEAD[:60], HEAD, HEAD + b"\x89PNG"])
def test_a_request_that_stops_coming_is_given_up(service: httpx.Client, start: bytes) -> None:
    with closing(connect(service)) as slow:
        slow.sendall(start)
        begun = time.monotonic()
        assert is_closed(slow)
        assert time.monotonic() - begun < 3


def test_two_hundred_dripping_senders_block_nobody_and_do_not_stay(service: httpx.Client, cat: bytes) -> None:
    with ExitStack() as stack:
        slow = [stack.enter_context(closing(connect(service))) for _ in range(200)]
        begun = time.monotonic()
        for connection in slow:
            connection.sendall(b"POST /predict HTTP/1.1\r\n")
        while time.monotonic() - begun < 0.3:
            for connection in slow:
                connection.sendall(b"A: b\r\n")
            answer = service.post("/predict", content=cat, headers={"content-type": "image/png"})
            assert answer.status_code == 200
        assert all(is_closed(connection) for connection in slow)
        assert time.monotonic() - begun < 10


@pytest.mark.parametrize("head", [b"GET /" + b"a" * 100_000, b"GET / HTTP/1.1\r\n" + b"X-A: b\r\n" * 20_000])
def test_an_endless_head_is_refused(service: httpx.Client, head: bytes) -> None:
    with closing(connect(service)) as endless:
        try:
            endless.sendall(head)
            assert endless.recv(100).startswith(b"HTTP/1.1 400")
        except (ConnectionResetError, BrokenPipeError):
            pass
    assert service.get("/healthz").status_code == 200


@pytest.mark.parametrize(
    "rubbish",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET / HTTP/9.9\r\n\r\n",
        b"\r\n\r\n\r\n",
        b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n",
        b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
        b"POST /predict HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"POST /predict HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n",
        b"GET /\x00 HTTP/1.1\r\nHost: x\r\n\r\n",
    ],
)
def test_rubbish_is_answered_with_400_or_closed(service: httpx.Client, rubbish: bytes) -> None:
    with closing(connect(service)) as connection:
        connection.sendall(rubbish)
        try:
            answer = connection.recv(200)
        except ConnectionResetError:
            answer = b""
        assert answer == b"" or answer[9:10] == b"4", answer
    assert service.get("/readyz").status_code == 200


def test_callers_who_vanish_leave_nothing_behind(service: httpx.Client, cat: bytes) -> None:
    """In mid-upload and while they wait, hundreds of times: no descriptor, no place in the queue."""
    whole = HEAD.replace(b"2400", str(len(cat)).encode()) + cat
    before = len(os.listdir("/proc/self/fd"))
    for i in range(600):
        with closing(connect(service)) as connection:
            connection.sendall(whole if i % 2 else whole[: 100 + i])
    deadline = time.monotonic() + 10
    while len(os.listdir("/proc/self/fd")) > before or "thirtytwo_queue_images 0.0" not in service.get("/metrics").text:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert service.post("/predict", content=cat, headers={"content-type": "image/png"}).status_code == 200


def test_a_caller_cannot_write_into_log_or_headers(service: httpx.Client, cat: bytes) -> None:
    with closing(connect(service)) as connection:
        connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\nX-Request-ID: a\x0bb\r\nConnection: close\r\n\r\n")
        answer = connection.recv(2000)
    assert b"a\x0bb" not in answer
    files = {"file": ("x\r\nInjected: 1\u202e.png", cat)}
    assert "injected" not in service.post("/predict", files=files).headers
