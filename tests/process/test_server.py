"""Signals, shutdown and listening of the service as a process."""

import io
import os
import pty
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from ipaddress import ip_address, ip_network
from pathlib import Path

import httpx
import pytest
from PIL import Image

from app.commands.serve import with_mapped
from app.process.server import listen
from tests.support.fault_injection import SHUTDOWN_TIMEOUT_S
from tests.support.raw_http import send_half
from tests.support.subprocesses import command, faulty_process, free_port, process, wait_until

pytestmark = pytest.mark.slow  # starts processes

PNG = {"content-type": "image/png"}


@pytest.fixture
def white() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32), "white").save(buffer, "PNG")
    return buffer.getvalue()


def port_of(url: str) -> int:
    return int(url.rpartition(":")[2])


@contextmanager
def half_sent(url: str, cat: bytes) -> Iterator[socket.socket]:
    """A connection with a request that is admitted and whose body has 100 bytes so far."""
    with socket.create_connection(("127.0.0.1", port_of(url)), timeout=30) as connection:
        send_half(connection, cat)
        yield connection


def handles(number: signal.Signals, pid: int) -> bool:
    """Whether the process has a handler for the signal."""
    (caught,) = re.findall(r"SigCgt:\s+(\w+)", Path(f"/proc/{pid}/status").read_text())
    return bool(int(caught, 16) >> (number - 1) & 1)


def finish(connection: socket.socket, cat: bytes) -> bytes:
    connection.sendall(cat[100:])
    return connection.recv(12)


def test_slow_body_does_not_outlast_the_shutdown_timeout(tiny_weights: Path, cat: bytes) -> None:
    with process(tiny_weights, "--shutdown-timeout-s", "0.5") as (running, url), half_sent(url, cat) as connection:

        def drip() -> None:
            for i in range(100, len(cat)):
                try:
                    connection.sendall(cat[i : i + 1])
                except OSError:
                    return
                time.sleep(0.3)

        thread = threading.Thread(target=drip)
        thread.start()
        running.terminate()
        _, log = running.communicate(timeout=20)
        thread.join()
    assert running.returncode == 0, log


def test_unread_answers_do_not_outlast_the_shutdown_timeout(tiny_weights: Path) -> None:
    with process(tiny_weights, "--shutdown-timeout-s", "0.5") as (running, url), closing(socket.socket()) as reader:
        reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        reader.connect(("127.0.0.1", port_of(url)))
        reader.sendall(b"GET /static/swagger/swagger-ui-bundle.js HTTP/1.1\r\nHost: x\r\n\r\n" * 8)
        time.sleep(0.5)
        running.terminate()
        _, log = running.communicate(timeout=20)
    assert running.returncode == 0, log


def test_stalled_inference_does_not_outlast_the_shutdown_timeout(tiny_weights: Path, white: bytes) -> None:
    with faulty_process("hanging", tiny_weights, THIRTYTWO_INFERENCE_TIMEOUT_S="600") as (running, url):
        head = b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: %d\r\n\r\n" % len(
            white
        )
        with socket.create_connection(("127.0.0.1", port_of(url))) as connection:
            connection.sendall(head + white)
            time.sleep(2)
            start = time.monotonic()
            running.terminate()
            log = running.communicate(timeout=20)[1]
    assert running.returncode == 0, log
    assert time.monotonic() - start < SHUTDOWN_TIMEOUT_S + 2  # not the 20 s of the settings once more
    assert "1 requests unanswered after 2 s" in log


def test_second_signal_abandons_what_is_in_flight(tiny_weights: Path, cat: bytes) -> None:
    with process(tiny_weights, "--shutdown-timeout-s", "600") as (running, url), half_sent(url, cat):
        running.terminate()
        time.sleep(2)  # two at once are one
        running.terminate()
        _, log = running.communicate(timeout=20)
    assert running.returncode == 0
    assert "Traceback" not in log


@pytest.mark.parametrize("workers", ["1", "2"])
def test_signal_to_process_and_group_counts_once(tiny_weights: Path, cat: bytes, workers: str) -> None:
    """As timeout(1) passes SIGTERM on."""
    with (
        process(tiny_weights, "--workers", workers, start_new_session=True) as (running, url),
        half_sent(url, cat) as connection,
    ):
        running.terminate()
        os.killpg(running.pid, signal.SIGTERM)
        time.sleep(0.5)
        assert finish(connection, cat) == b"HTTP/1.1 200"
        assert running.wait(20) == 0


def test_signal_during_the_start_exits_with_0(tiny_weights: Path) -> None:
    for delay_s in (0.0, 0.4, 1.0):
        with subprocess.Popen(
            command("--weights", str(tiny_weights), "--port", "0"), stderr=subprocess.PIPE, text=True
        ) as running:
            wait_until(lambda running=running: handles(signal.SIGTERM, running.pid))
            time.sleep(delay_s)
            running.terminate()
            log = running.communicate(timeout=30)[1]
        assert running.returncode == 0, log
        assert "Traceback" not in log


@pytest.mark.parametrize("workers", ["1", "2"])
def test_service_manager_signals_every_process(tiny_weights: Path, cat: bytes, workers: str) -> None:
    """systemd sends SIGTERM to all processes of a unit, and the supervisor sends a worker another one."""
    with process(tiny_weights, "--workers", workers, start_new_session=True) as (running, url):
        with half_sent(url, cat) as connection:
            os.killpg(running.pid, signal.SIGTERM)
            time.sleep(1)
            assert finish(connection, cat) == b"HTTP/1.1 200"
        _, log = running.communicate(timeout=30)
    assert running.returncode == 0, log


@pytest.mark.parametrize("workers", ["1", "2"])
def test_sighup_reloads_keys_and_loses_nothing(tiny_weights: Path, cat: bytes, tmp_path: Path, workers: str) -> None:
    file = tmp_path / "keys"
    file.write_text("old")
    flags = ("--api-keys-file", str(file), "--workers", workers)
    log = tmp_path / "log"
    with log.open("w") as stream, process(tiny_weights, *flags, stderr=stream) as (running, url):
        with socket.create_connection(("127.0.0.1", port_of(url)), timeout=30) as connection:
            send_half(connection, cat, "X-API-Key: old\r\n")
            file.write_text("new")
            running.send_signal(signal.SIGHUP)
            time.sleep(0.5)
            assert finish(connection, cat) == b"HTTP/1.1 200"

        def status() -> int:
            return httpx.post(f"{url}/predict", content=cat, headers=PNG | {"x-api-key": "new"}).status_code

        wait_until(lambda: [status() for _ in range(8)] == [200] * 8)
        wait_until(lambda: "SIGHUP: reloading" in log.read_text())
        assert running.poll() is None
        running.terminate()
        assert running.wait(30) == 0
    reloads = log.read_text().count("SIGHUP: reloading")
    assert 1 <= reloads <= int(workers)  # a worker that starts later reads the new file anyway


def test_closed_terminal_stops_the_service(tiny_weights: Path) -> None:
    port = free_port()
    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(sys.executable, command("--weights", str(tiny_weights), "--port", str(port)))  # noqa: S606

    def ready() -> bool:
        with suppress(httpx.TransportError):
            return httpx.get(f"http://127.0.0.1:{port}/readyz").status_code == 200
        return False

    wait_until(ready)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


@pytest.mark.parametrize("workers", ["1", "2"])
def test_dual_stack_address_accepts_both_families(tiny_weights: Path, workers: str) -> None:
    with process(tiny_weights, "--host", "::", "--workers", workers) as (running, url):
        assert httpx.get(f"http://[::1]:{port_of(url)}/healthz").status_code == 200
        assert httpx.get(f"http://127.0.0.1:{port_of(url)}/healthz").status_code == 200
        running.terminate()
        _, log = running.communicate(timeout=30)
    assert f"serving on http://[::]:{port_of(url)}" in log


def test_proxies_are_trusted_on_a_dual_stack_socket() -> None:
    trusted = ip_network(with_mapped(["10.0.0.0/8", "::1"])[2])
    assert ip_address("::ffff:10.1.2.3") in trusted
    assert ip_address("::ffff:11.1.2.3") not in trusted
    assert with_mapped(["10.0.0.1", "*"]) == ["*"]


def test_listen_binds_every_address_of_a_name() -> None:
    sockets = listen("localhost", 0)
    try:
        assert len({sock.getsockname()[1] for sock in sockets}) == 1
        assert {sock.getsockname()[0] for sock in sockets} <= {"127.0.0.1", "::1"}
    finally:
        for sock in sockets:
            sock.close()
