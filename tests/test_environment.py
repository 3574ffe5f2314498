"""What the service promises on a bad machine: a full disk, no place to write, few descriptors, a clock that jumps."""

import ast
import os
import re
import resource
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from email.utils import parsedate_to_datetime
from pathlib import Path

import httpx
import pytest

from tests.support.subprocesses import command, faulty_process, free_port, process, wait_until

pytestmark = pytest.mark.slow  # starts processes

APP = Path(__file__).parents[1] / "app"
FAKETIME = next(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"), None)


def ask(url: str, cat: bytes) -> int:
    return httpx.post(f"{url}/predict", content=cat, headers={"content-type": "image/png"}, timeout=30).status_code


def limited(kind: int, limit: int) -> Callable[[], None]:
    return lambda: resource.setrlimit(kind, (limit, limit))


def no_file_may_grow() -> Callable[[], None]:
    """Every write to a file fails from its first byte on, as on a read-only file system or a full disk."""
    return limited(resource.RLIMIT_FSIZE, 0)


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_full_disk_under_the_log_harms_nothing(tiny_weights: Path, cat: bytes, log_format: str) -> None:
    with (
        Path("/dev/full").open("w") as full,
        process(tiny_weights, "--log-format", log_format, stderr=full, stdout=full) as (running, url),
    ):
        assert [ask(url, cat) for _ in range(20)] == [200] * 20
        assert httpx.post(f"{url}/predict", content=b"?").status_code == 415
        wait_until(lambda: dropped_lines(url) >= 20)
        running.terminate()
        assert running.wait(30) == 0


def dropped_lines(url: str) -> float:
    found = re.search(r"^thirtytwo_log_lines_dropped_total (\S+)$", httpx.get(f"{url}/metrics").text, re.MULTILINE)
    assert found
    return float(found[1])


def test_stuck_log_reader_stops_no_request(tiny_weights: Path, cat: bytes) -> None:
    """The pipe behind stderr is full and nobody reads it, also not at the end."""
    reader, writer = os.pipe()
    with process(tiny_weights, stderr=writer, stdout=writer) as (running, url):
        os.set_blocking(writer, False)
        with suppress(BlockingIOError):
            while True:
                os.write(writer, b"x" * 4096)
        os.set_blocking(writer, True)  # shared with the service
        with httpx.Client(base_url=url, timeout=30) as client:
            for _ in range(300):
                assert client.get("/healthz").status_code == 200
        assert ask(url, cat) == 200
        running.terminate()
        assert running.wait(30) == 0
    os.close(reader)
    os.close(writer)


@pytest.mark.parametrize(("descriptors", "workers"), [((2,), "1"), ((0, 1, 2), "1"), ((0, 1, 2), "2")])
def test_closed_standard_streams_harm_nothing(
    tiny_weights: Path, cat: bytes, descriptors: tuple[int, ...], workers: str
) -> None:
    def close() -> None:
        for descriptor in descriptors:
            os.close(descriptor)

    streams = {"stdin": None, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with process(tiny_weights, "--workers", workers, preexec_fn=close, **streams) as (running, url):
        assert [ask(url, cat) for _ in range(10)] == [200] * 10
        assert httpx.get(f"{url}/nothing").status_code == 404
        running.terminate()
        assert running.wait(30) == 0


def test_reader_that_closes_the_log_harms_nothing(tiny_weights: Path, cat: bytes) -> None:
    reader, writer = os.pipe()
    with process(tiny_weights, stderr=writer) as (running, url):
        os.close(reader)
        assert [ask(url, cat) for _ in range(10)] == [200] * 10
        running.terminate()
        assert running.wait(30) == 0
    os.close(writer)


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_last_log_lines_are_written_at_exit(tiny_weights: Path, log_format: str) -> None:
    with process(tiny_weights, "--log-format", log_format) as (running, url):
        for i in range(20):
            httpx.get(f"{url}/healthz", headers={"x-request-id": f"last-{i}", "connection": "close"})
        running.terminate()
        _, log = running.communicate(timeout=30)
    assert all(f"last-{i}" in log for i in range(20))


def test_pause_in_the_middle_of_a_batch_is_no_stall(tiny_weights: Path, cat: bytes) -> None:
    """As by `docker pause` or a snapshot: the batch began longer ago than the timeout, but not of running time."""
    limits = {"THIRTYTWO_INFERENCE_TIMEOUT_S": "2", "THIRTYTWO_REQUEST_TIMEOUT_S": "60"}
    with faulty_process("slow", tiny_weights, **limits) as (running, url), ThreadPoolExecutor(1) as pool:
        files = [("file", ("cat.png", cat))] * 256  # 0.01 s each
        answer = pool.submit(lambda: httpx.post(f"{url}/predict", files=files, timeout=60))
        time.sleep(0.5)
        running.send_signal(signal.SIGSTOP)
        time.sleep(4)
        running.send_signal(signal.SIGCONT)
        assert answer.result().status_code == 200
        time.sleep(2)
        assert httpx.get(f"{url}/readyz").status_code == 200
        running.terminate()
        log = running.communicate(timeout=30)[1]
    assert running.returncode == 0, log
    assert "stalled" not in log


def test_service_needs_no_home_and_no_writable_disk(tiny_weights: Path, cat: bytes) -> None:
    bare = {"PATH": os.environ["PATH"]}
    with process(tiny_weights, env=bare, preexec_fn=no_file_may_grow()) as (running, url):
        assert ask(url, cat) == 200
        for path in ("/", "/docs", "/metrics", "/model"):
            assert httpx.get(url + path).status_code == 200, path
        running.terminate()
        assert running.wait(30) == 0


def test_workers_without_a_temporary_directory_exit_with_2(tiny_weights: Path) -> None:
    flags = ("--weights", str(tiny_weights), "--port", str(free_port()), "--workers", "2")
    ended = subprocess.run(
        command(*flags), capture_output=True, text=True, timeout=60, preexec_fn=no_file_may_grow(), check=False
    )
    assert ended.returncode == 2
    (line,) = (line for line in ended.stderr.splitlines() if "error" in line.lower())
    assert "No usable temporary directory" in line
    assert "Traceback" not in ended.stderr


def test_exhausted_descriptors_leave_open_connections_working(tiny_weights: Path, cat: bytes) -> None:
    preexec_fn = limited(resource.RLIMIT_NOFILE, 64)
    with process(tiny_weights, preexec_fn=preexec_fn, stderr=subprocess.DEVNULL) as (running, url):
        address = ("127.0.0.1", int(url.rpartition(":")[2]))
        with httpx.Client(base_url=url, timeout=30) as early, ExitStack() as stack:
            assert early.get("/readyz").status_code == 200
            for _ in range(100):
                stack.enter_context(closing(socket.create_connection(address, timeout=10)))
            wait_until(lambda: len(os.listdir(f"/proc/{running.pid}/fd")) > 60)
            for _ in range(10):
                response = early.post("/predict", content=cat, headers={"content-type": "image/png"})
                assert response.status_code == 200
        deadline = time.monotonic() + 30
        while True:
            try:
                assert ask(url, cat) == 200
                break
            except httpx.TransportError:
                assert time.monotonic() < deadline
                time.sleep(0.1)
        running.terminate()
        assert running.wait(30) == 0


def test_durations_use_a_monotonic_clock() -> None:
    """Durations, deadlines and the watchdog go by clocks that cannot."""
    readers = {
        str(file.relative_to(APP))
        for file in APP.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Attribute)
        and ast.unparse(node) in {"time.time", "time.time_ns", "datetime.now", "datetime.datetime.now", "date.today"}
    }
    assert readers == {"telemetry/logs.py", "telemetry/statistics.py", "telemetry/tracing.py"}


@pytest.mark.skipif(FAKETIME is None, reason="libfaketime is not installed; CI installs it")
def test_clock_that_jumps_harms_nothing(tiny_weights: Path, cat: bytes, tmp_path: Path) -> None:
    clock = tmp_path / "clock"
    clock.write_text("+0")
    environment = os.environ | {
        "LD_PRELOAD": str(FAKETIME),
        "FAKETIME_TIMESTAMP_FILE": str(clock),
        "FAKETIME_NO_CACHE": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
    }
    flags = ("--inference-timeout-s", "5", "--request-timeout-s", "20")
    with process(tiny_weights, *flags, env=environment, stderr=subprocess.DEVNULL) as (running, url):
        for days in (400, -400, 0):
            clock.write_text(f"{days:+}d")
            deadline = time.monotonic() + 20
            while abs(told_days(url) - days) > 1:  # until the service sees the other time
                assert time.monotonic() < deadline
                time.sleep(0.1)
            assert [ask(url, cat) for _ in range(5)] == [200] * 5
            assert httpx.get(f"{url}/readyz").status_code == 200
        running.terminate()
        assert running.wait(30) == 0


def told_days(url: str) -> float:
    """How far the service's clock is before ours, by its Date header."""
    told = parsedate_to_datetime(httpx.get(f"{url}/healthz").headers["date"])
    return (told.timestamp() - time.time()) / 86_400
