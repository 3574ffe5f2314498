"""Slow, endless and vanishing callers."""

import json
import os
import re
import select
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import httpx
import pytest

from app.api.http_protocol import Protocol
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


class Stalling(Impatient):
    """Keeps the event loop busy for longer than its patience when asked for /stall."""

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        if url == b"/stall":
            time.sleep(2 * self.patience_s)


def test_what_arrives_while_we_are_busy_is_not_called_late(tiny_weights: Path, cat: bytes) -> None:
    head = HEAD.replace(b"2400", str(len(cat)).encode())
    with (
        serving(Settings(weights=tiny_weights, max_batch=1), protocol=Stalling) as client,
        closing(connect(client)) as punctual,
        closing(connect(client)) as other,
    ):
        punctual.sendall(head + cat[:100])
        other.sendall(b"GET /stall HTTP/1.1\r\nHost: x\r\n\r\n")
        time.sleep(0.2)
        punctual.sendall(cat[100:])
        assert punctual.recv(100).startswith(b"HTTP/1.1 200")


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


def test_large_bodies_together_are_bounded_and_small_ones_pass(tiny_weights: Path, cat: bytes) -> None:
    """Callers who each stay within the limit of one body must not fill the memory together."""
    settings = Settings(weights=tiny_weights, max_batch=1, max_body_bytes=2_000_000, max_inflight_bytes=4_000_000)
    head = b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: 1900000\r\n\r\n"
    with serving(settings) as client:
        with ExitStack() as stack:
            large = [stack.enter_context(closing(connect(client))) for _ in range(4)]
            for connection in large:
                connection.sendall(head + bytes(1_500_000))
            refused, _, _ = select.select(large, [], [], 10)
            assert all(connection.recv(12) == b"HTTP/1.1 429" for connection in refused)
            assert 1 <= len(refused) <= 2
            assert client.post("/predict", files=[("file", ("x.png", cat))] * 90).status_code == 200
        deadline = time.monotonic() + 10
        while client.post("/predict", content=bytes(1_900_000)).status_code == 429:  # until they are noticed to be gone
            assert time.monotonic() < deadline


FORM = b'--X\r\nContent-Disposition: form-data; name="file"; filename="%b"\r\n\r\n%b\r\n--X--\r\n'
MULTIPART = {"content-type": "multipart/form-data; boundary=X"}
FORGERIES = (
    b"a\x0bb",
    b"a\tb",
    b"a b",
    b"x" * 129,
    b"\xe2\x80\xae",
    b'", "level": "critical',
    b"a%0d%0aFORGED",
    b"\x1b[31mFORGED",
)


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_a_caller_cannot_write_into_log_or_headers(
    tiny_weights: Path, cat: bytes, log_format: str, capfd: pytest.CaptureFixture[str]
) -> None:
    settings = Settings(weights=tiny_weights, max_batch=1, log_format=log_format)
    with serving(settings, protocol=Impatient) as client:
        for forged in FORGERIES:
            with closing(connect(client)) as connection:
                head = b"GET /%%0aFORGED HTTP/1.1\r\nHost: FORGED\r\nX-Request-ID: %b\r\nConnection: close\r\n\r\n"
                connection.sendall(head % forged)
                answer = connection.recv(4000)
            assert answer[9:12] == (b"400" if b"\x0b" in forged or b"\x1b" in forged else b"404"), answer
            assert forged not in answer
            assert answer.count(b"x-request-id") <= 1
        response = client.post("/predict", content=FORM % (b"a\r\nFORGED: 1", cat), headers=MULTIPART)
        assert "forged" not in response.headers
        time.sleep(0.3)  # the log is written ten times a second
    lines = [line for line in capfd.readouterr().err.splitlines() if "GET" in line or "POST" in line]
    assert len(lines) >= 5
    assert not [line for line in lines if "FORGED" in line or "critical" in line]
    for line in lines:
        if log_format == "json":
            assert set(json.loads(line)) == {
                "time",
                "level",
                "logger",
                "message",
                "request_id",
                "route",
                "status",
                "ms",
            }
        else:
            assert re.fullmatch(r"\S+Z INFO    (GET|POST) \S+ \d{3} in [\d.]+ ms \[[\w.-]+\]", line), line


@pytest.mark.parametrize(
    "name", ["../../etc/passwd", "\u202egnp.exe", "<img src=x onerror=alert(1)>", "a\u0000b\u001b[31m"]
)
def test_file_names_come_back_as_they_were(service: httpx.Client, cat: bytes, name: str) -> None:
    """JSON's escapes are all the care a name needs, since nothing here ever uses one."""
    response = service.post("/predict", content=FORM % (name.encode(), cat), headers=MULTIPART)
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-content-type-options"] == "nosniff"
    assert response.json()["predictions"][0]["filename"] == name
    assert "\x00" not in response.text
    assert "\x1b" not in response.text


def test_a_body_longer_than_it_says_is_cut_and_the_rest_is_no_request(service: httpx.Client, cat: bytes) -> None:
    with closing(connect(service)) as connection:
        head = b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: %d\r\n\r\n" % (
            len(cat) - 9
        )
        connection.sendall(head + cat)
        answers = b""
        while chunk := connection.recv(4000):
            answers += chunk
    assert answers.startswith(b"HTTP/1.1 ")
    assert answers.count(b"HTTP/1.1 400") == 1


def test_a_body_without_a_length_is_an_empty_one(service: httpx.Client) -> None:
    with closing(connect(service)) as connection:
        connection.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\n\r\n")
        answer = connection.recv(4000)
    assert answer.startswith(b"HTTP/1.1 400")
    assert b"The body is empty." in answer
