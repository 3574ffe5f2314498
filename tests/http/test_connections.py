"""Slow, large, vanishing and silent clients, and what their connections hold."""

import http.client
import json
import os
import re
import select
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import httpx
import numpy as np
import pytest
from numpy.typing import NDArray
from starlette.types import Receive, Scope, Send

from app.http.connections import SMALL_REQUEST_BYTES, TRIM_BYTES, Connections, InflightBytes, render_text
from app.http.http_protocol import Protocol
from app.settings import Settings
from tests.conftest import serving
from tests.support import fault_injection, logs
from tests.support.raw_http import (
    CLOSE,
    TIMEOUT_S,
    connect,
    echo,
    exchange,
    port_of,
    read_to_end,
    request,
    responses,
    serve,
    wait_until,
)
from tests.support.subprocesses import process

HEAD = b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: 2400\r\n\r\n"
LARGE_FILE = "/static/swagger/swagger-ui-bundle.js"


class Impatient(Protocol):
    read_timeout_s = 0.5
    write_timeout_s = 0.5


@pytest.fixture(scope="module")
def service(tiny_weights: Path) -> Iterator[httpx.Client]:
    with serving(Settings(weights=tiny_weights, max_batch=8), protocol=Impatient) as client:
        yield client


@pytest.fixture(scope="module")
def port(service: httpx.Client) -> int:
    return service.base_url.port or 0


# Requests that arrive slowly


@pytest.mark.slow
@pytest.mark.parametrize("start", [b"POST /pre", HEAD[:60], HEAD, HEAD + b"\x89PNG"])
def test_a_request_that_stops_arriving_gets_408(port: int, start: bytes) -> None:
    (response,) = exchange(port, start)
    assert response.status == 408
    assert json.loads(response.body)["type"] == "urn:thirtytwo:problem:request-timeout"


@pytest.mark.slow
@pytest.mark.parametrize("start", [b"", b"\r\n"])
def test_a_connection_without_a_request_is_closed(port: int, start: bytes) -> None:
    assert exchange(port, start) == []


class Stalling(Impatient):
    """Blocks the event loop for longer than its timeout on a request for /stall."""

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        if url == b"/stall":
            time.sleep(2 * self.read_timeout_s)


@pytest.mark.slow
def test_data_that_arrives_during_a_stall_is_in_time(tiny_weights: Path, cat: bytes) -> None:
    head = HEAD.replace(b"2400", str(len(cat)).encode())
    with (
        serving(Settings(weights=tiny_weights, max_batch=1), protocol=Stalling) as client,
        connect(client.base_url.port or 0) as punctual,
        connect(client.base_url.port or 0) as other,
    ):
        punctual.sendall(head + cat[:100])
        other.sendall(request("/stall"))
        time.sleep(0.2)
        punctual.sendall(cat[100:])
        assert punctual.recv(100).startswith(b"HTTP/1.1 200")


@pytest.mark.slow
def test_two_hundred_slow_senders_block_nobody(service: httpx.Client, port: int, cat: bytes) -> None:
    with ExitStack() as stack:
        slow = [stack.enter_context(connect(port)) for _ in range(200)]
        for connection in slow:
            connection.sendall(b"POST /predict HTTP/1.1\r\n")
        for _ in range(3):
            for connection in slow:
                connection.sendall(b"A: b\r\n")
            answer = service.post("/predict", content=cat, headers={"content-type": "image/png"})
            assert answer.status_code == 200
        assert all(responses(read_to_end(connection))[0].status == 408 for connection in slow)


# Responses that are not read


def test_a_client_that_reads_nothing_is_disconnected(service: httpx.Client, port: int) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with connect(port, receive_buffer=4096) as connection:
        connection.sendall(request(LARGE_FILE) * 20)
        wait_until(lambda: len(os.listdir("/proc/self/fd")) <= before + 1)  # the server's end is closed
    assert service.get("/healthz").status_code == 200


@pytest.mark.slow
def test_a_client_that_reads_slowly_gets_everything(service: httpx.Client, port: int) -> None:
    size = len(service.get(LARGE_FILE).content)
    with connect(port, receive_buffer=4096) as connection:
        connection.sendall(request(LARGE_FILE, headers=CLOSE))
        received, deadline = b"", time.monotonic() + 3 * Impatient.write_timeout_s
        while time.monotonic() < deadline:
            received += connection.recv(20_000)
            time.sleep(0.02)
        received += read_to_end(connection)
    assert len(responses(received)[0].body) == size


@pytest.mark.slow
def test_line_ends_do_not_keep_an_idle_connection() -> None:
    with serve(echo, timeout_keep_alive=0.5) as server, connect(port_of(server)) as connection:
        connection.sendall(request("/a"))
        connection.recv(1000)
        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            send_for_ever(connection, b"\r\n", 0.1)


@pytest.mark.slow
def test_an_idle_connection_is_kept_for_the_timeout() -> None:
    with serve(echo, timeout_keep_alive=60) as server, connect(port_of(server)) as connection:
        for _ in range(2):
            connection.sendall(request("/a"))
            assert b"GET /a " in connection.recv(1000)
            time.sleep(2.5)  # over two checks of the timeouts


# Requests that are refused before they are read


@pytest.mark.parametrize("size", [11_000_000, 40_000_000])
def test_a_client_that_sends_first_sees_the_413(service: httpx.Client, port: int, size: int) -> None:
    for _ in range(3):
        client = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_S)
        with closing(client):
            client.request("POST", "/predict", bytes(size), {"Content-Type": "image/png"})
            response = client.getresponse()
            assert response.status == 413
            assert json.loads(response.read())["type"] == "urn:thirtytwo:problem:too-large"


def test_a_chunked_body_is_refused_at_the_limit(tiny_weights: Path) -> None:
    settings = Settings(weights=tiny_weights, max_batch=1, max_file_bytes=100_000)
    head = request("/predict", headers="Content-Type: image/png\r\nTransfer-Encoding: chunked\r\n", method="POST")
    with serving(settings) as client, connect(client.base_url.port or 0) as connection:
        connection.sendall(head + (b"10000\r\n" + bytes(65_536) + b"\r\n") * 100)
        (response,) = responses(read_to_end(connection))
        assert (response.status, response.headers["connection"]) == (413, "close")


def test_a_refused_small_body_leaves_the_connection(port: int) -> None:
    sent = request("/nowhere", bytes(100_000)) + request("/healthz", headers=CLOSE)
    assert [response.status for response in exchange(port, sent)] == [404, 200]


def test_a_refusal_instead_of_100_continue_closes(port: int) -> None:
    """Nobody can say whether the body follows: it could be parsed as a request, or a request as the body."""
    sent = request("/predict", headers="Content-Length: 9\r\nExpect: 100-continue\r\n", method="POST")
    (response,) = exchange(port, sent)
    assert (response.status, response.headers["connection"]) == (415, "close")


def test_a_lingering_close_ends() -> None:
    """A client that goes on sending without end."""

    async def refuse(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await echo(scope, receive, send)
            return
        await send({"type": "http.response.start", "status": 413, "headers": [(b"connection", b"close")]})
        await send({"type": "http.response.body"})

    with serve(refuse, Impatient) as server, connect(port_of(server)) as connection:
        connection.sendall(request("/", headers="Content-Length: 1000000000\r\n", method="POST"))
        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            send_for_ever(connection, bytes(1_000_000))


def send_for_ever(connection: socket.socket, data: bytes, pause_s: float = 0.0) -> None:
    deadline = time.monotonic() + 2 * TIMEOUT_S
    while time.monotonic() < deadline:
        connection.sendall(data)
        time.sleep(pause_s)


# Clients that leave


def test_clients_that_vanish_leave_nothing_behind(service: httpx.Client, port: int, cat: bytes) -> None:
    """In mid-upload and while they wait, hundreds of times: no descriptor, no place in the queue."""
    whole = HEAD.replace(b"2400", str(len(cat)).encode()) + cat
    before = len(os.listdir("/proc/self/fd"))
    for i in range(600):
        with connect(port) as connection:
            connection.sendall(whole if i % 2 else whole[: 100 + i])
    wait_until(
        lambda: (
            len(os.listdir("/proc/self/fd")) <= before
            and re.search(r"thirtytwo_queue_\w+ 0.0", service.get("/metrics").text) is not None
        )
    )
    assert service.post("/predict", content=cat, headers={"content-type": "image/png"}).status_code == 200


@pytest.mark.slow
@pytest.mark.parametrize("path", ["/predict", "/v2/models/tiny_image/infer"])
@pytest.mark.parametrize("complete", [True, False], ids=["waiting", "uploading"])
def test_a_client_that_leaves_counts_as_499(
    tiny_weights: Path, cat: bytes, capfd: pytest.CaptureFixture[str], path: str, complete: bool
) -> None:
    released = threading.Event()

    def wait(probabilities: NDArray[np.float32], faulty: NDArray[np.bool_]) -> NDArray[np.float32]:
        if faulty.any():
            released.wait(TIMEOUT_S)
        return probabilities

    settings = Settings(weights=tiny_weights, max_batch=1)
    white = np.full((32, 32, 3), 255, np.uint8)
    headers = "Content-Type: image/bmp\r\n" if path == "/predict" else "Inference-Header-Content-Length: 0\r\n"
    with serving(settings, fault_injection.load(wait)) as client:
        sent = request(path, bitmap(white), headers + "X-Request-ID: left\r\n")
        with connect(client.base_url.port or 0) as connection:
            connection.sendall(sent if complete else sent[:-1])
            time.sleep(0.2)
        route = path.replace("tiny_image", "{name}")
        expected = f'thirtytwo_requests_total{{route="{route}",status="499"}} 1.0'
        wait_until(lambda: expected in client.get("/metrics").text)
        assert "client-closed-request" not in client.get("/metrics").text  # no rejection
        released.set()
    log = logs.read(capfd)
    assert re.findall(r"INFO    (.*) in .* \[left\]", log) == [f"POST {route} 499"]
    assert "ERROR" not in log
    assert "Traceback" not in log


def bitmap(pixels: NDArray[np.uint8]) -> bytes:
    """A BMP file of RGB uint8 [height, width, 3]; the width is a multiple of 4."""
    height, width, _ = pixels.shape
    data = pixels[::-1, :, ::-1].tobytes()
    header = np.array([40, width, height, 1 | 24 << 16, 0, len(data), 0, 0, 0, 0], "<u4").tobytes()
    return b"BM" + np.array([54 + len(data), 0, 54], "<u4").tobytes() + header + data


# Bytes in flight


def test_unfinished_uploads_are_bounded_and_small_ones_pass(tiny_weights: Path, cat: bytes) -> None:
    """Clients that each stay within the limit of one body must not fill the memory together."""
    settings = Settings(weights=tiny_weights, max_batch=1, max_body_bytes=2_000_000, max_inflight_bytes=4_000_000)
    head = b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: 1900000\r\n\r\n"
    with serving(settings) as client:
        with ExitStack() as stack:
            large = [stack.enter_context(connect(client.base_url.port or 0)) for _ in range(4)]
            for connection in large:
                connection.sendall(head + bytes(1_500_000))
            wait_until(lambda: len(select.select(large, [], [], 0)[0]) >= 2)
            refused, _, _ = select.select(large, [], [], 0)
            assert all(connection.recv(12) == b"HTTP/1.1 429" for connection in refused)
            assert len(refused) == 2
            assert client.post("/predict", files=[("file", ("x.png", cat))] * 20).status_code == 200
            assert client.get("/healthz").status_code == 200
        wait_until(lambda: client.post("/predict", content=bytes(1_900_000)).status_code != 429)


@pytest.mark.parametrize(
    "start",
    [
        b"GET / HTTP/1.1\r\nA: " + b"a" * 8_000,  # a head
        HEAD.replace(b"2400", b"60000") + bytes(50_000),  # a small body
        HEAD.replace(b"2400", b"0") + HEAD * 200,  # pipelined requests, behind one that is answered
    ],
    ids=["head", "body", "pipelined"],
)
def test_all_bytes_count_and_are_released(start: bytes) -> None:
    """Also those of heads, small bodies, and requests that are not parsed."""
    counted = Counted()

    async def never(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            scope["state"]["connections"] = counted
            await echo(scope, receive, send)
        else:
            while (await receive())["type"] != "http.disconnect":
                pass

    with serve(never) as server:
        with ExitStack() as stack:
            for _ in range(10):
                stack.enter_context(connect(port_of(server))).sendall(start)
            wait_until(lambda: counted.inflight.used == 10 * len(start))
        wait_until(lambda: counted.inflight.used == 0)


def test_unread_responses_count_and_are_released() -> None:
    counted = Counted()

    async def large(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            scope["state"]["connections"] = counted
            await echo(scope, receive, send)
        else:
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": bytes(30_000_000)})

    with serve(large) as server:
        with connect(port_of(server)) as connection:
            connection.sendall(request("/"))
            wait_until(lambda: counted.inflight.used > 10_000_000)
        wait_until(lambda: counted.inflight.used == 0)


class Counted(Connections):
    def __init__(self) -> None:
        super().__init__(render_text)


def test_the_last_eighth_is_for_small_requests() -> None:
    inflight = InflightBytes(8_000_000)
    inflight.add(6_900_000)
    inflight.add(200_000)
    assert inflight.exceeds(200_000)
    assert not inflight.exceeds(SMALL_REQUEST_BYTES)
    inflight.add(900_001)
    assert inflight.exceeds(1)


def test_memory_is_returned_once_after_a_peak() -> None:
    returned = threading.Semaphore(0)
    inflight = InflightBytes(return_memory=returned.release)
    inflight.add(TRIM_BYTES + 1)
    inflight.trim()
    inflight.add(-TRIM_BYTES)
    inflight.trim()  # more may be released at this moment
    assert not returned.acquire(timeout=0.1)
    inflight.trim()
    inflight.trim()
    assert returned.acquire(timeout=TIMEOUT_S)
    assert not returned.acquire(timeout=0.1)


@pytest.mark.slow
def test_the_memory_of_a_process_is_bounded_and_returned(tiny_weights: Path) -> None:
    """1,000 clients offer 260 MB, each within every limit; 128 MB are allowed."""
    head = request("/predict", headers="Content-Type: image/png\r\nContent-Length: 262000\r\n", method="POST")
    with process(tiny_weights, "--max-held-bytes", "128000000", "--log-level", "warning") as (running, url):
        before = resident_mb(running.pid)
        with ExitStack() as stack:
            for _ in range(1000):
                connection = stack.enter_context(connect(int(url.rpartition(":")[2])))
                connection.sendall(head)
                connection.sendall(bytes(260_000))
            wait_until(lambda: b'status="429"' in httpx.get(f"{url}/metrics").content)
            assert resident_mb(running.pid) - before < 200
            assert httpx.get(f"{url}/healthz").status_code == 200
        wait_until(lambda: resident_mb(running.pid) - before < 50)


def resident_mb(pid: int) -> float:
    return int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[1]) / 1024  # type: ignore[index]


def test_a_large_upload_alone_may_fill_the_limit() -> None:
    inflight = InflightBytes(8_000_000)
    inflight.add(8_000_000)
    assert not inflight.exceeds(7_500_000)


# What clients send, in the log and in responses

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


@pytest.mark.slow
@pytest.mark.parametrize("log_format", ["text", "json"])
def test_a_caller_cannot_write_into_log_or_headers(
    tiny_weights: Path, cat: bytes, log_format: str, capfd: pytest.CaptureFixture[str]
) -> None:
    settings = Settings(weights=tiny_weights, max_batch=1, log_format=log_format)
    with serving(settings, protocol=Impatient) as client:
        for forged in FORGERIES:
            with connect(client.base_url.port or 0) as connection:
                head = b"GET /%%0aFORGED HTTP/1.1\r\nHost: FORGED\r\nX-Request-ID: %b\r\nConnection: close\r\n\r\n"
                connection.sendall(head % forged)
                answer = connection.recv(4000)
            assert answer[9:12] == (b"400" if b"\x0b" in forged or b"\x1b" in forged else b"404"), answer
            assert forged not in answer
            assert answer.count(b"x-request-id") <= 1
        response = client.post("/predict", content=FORM % (b"a\r\nFORGED: 1", cat), headers=MULTIPART)
        assert "forged" not in response.headers
    lines = [line for line in logs.read(capfd).splitlines() if "GET" in line or "POST" in line]
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


def test_bytes_behind_a_body_are_no_request(port: int, cat: bytes) -> None:
    with connect(port) as connection:
        head = b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: %d\r\n\r\n" % (
            len(cat) - 9
        )
        connection.sendall(head + cat)
        answers = b""
        while chunk := connection.recv(4000):
            answers += chunk
    assert answers.startswith(b"HTTP/1.1 ")
    assert answers.count(b"HTTP/1.1 400") == 1


def test_a_body_without_a_length_is_empty(port: int) -> None:
    with connect(port) as connection:
        connection.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\n\r\n")
        answer = connection.recv(4000)
    assert answer.startswith(b"HTTP/1.1 400")
    assert b"The body is empty." in answer
