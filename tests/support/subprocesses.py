"""The service as a subprocess, for tests of signals, exit codes and the environment."""

import atexit
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx


def free_port() -> int:
    """A port that only a server with SO_REUSEADDR can bind: the kernel gives it to nobody else."""
    probe = socket.socket()
    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    probe.bind(("127.0.0.1", 0))
    atexit.register(probe.close)
    port: int = probe.getsockname()[1]
    return port


def command(*flags: str) -> list[str]:
    return [sys.executable, "-m", "app", *flags]


@contextmanager
def process(weights: Path, *flags: str, **options: Any) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The service as a ready subprocess, and its URL. `options` are those of Popen."""
    port = free_port()
    line = command("--weights", str(weights), "--port", str(port), "--max-batch", "16", *flags)
    with _ready(line, port, **options) as ready:
        yield ready


@contextmanager
def faulty_process(
    fault: str, weights: Path, workers: int = 1, **environment: str
) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The service with an engine that has this fault, as a ready subprocess, and its URL."""
    port = free_port()
    line = [sys.executable, "-m", "tests.support.fault_injection", fault, str(weights), str(port), str(workers)]
    with _ready(line, port, env={**os.environ, **environment}) as ready:
        yield ready


@contextmanager
def _ready(line: list[str], port: int, **options: Any) -> Iterator[tuple[subprocess.Popen[str], str]]:
    running = subprocess.Popen(line, **{"stderr": subprocess.PIPE, "text": True, **options})
    url = f"http://127.0.0.1:{port}"
    try:
        wait_until_ready(running, url)
        yield running, url
    finally:
        running.kill()
        running.communicate()


def wait_until_ready(running: subprocess.Popen[str], url: str) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        assert running.poll() is None, running.communicate()[1]
        try:
            if httpx.get(f"{url}/readyz").status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.1)
    raise AssertionError("not ready in 60 s")


def fails(*flags: str, **environment: str) -> str:
    """The standard error of a command that exits with code 2."""
    ended = subprocess.run(
        command(*flags), capture_output=True, text=True, timeout=100, env={**os.environ, **environment}, check=False
    )
    assert ended.returncode == 2, ended.stderr
    assert "Traceback" not in ended.stderr
    return ended.stderr


def children(pid: int) -> list[int]:
    """The processes of a supervisor, without the resource tracker of multiprocessing."""
    started = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return [child for child in started if b"spawn_main" in _read(child, "cmdline")]


def engine_processes(pid: int) -> list[int]:
    """Those children of a supervisor that have loaded an engine library."""
    return [child for child in children(pid) if b"libopenvino.so" in _read(child, "maps")]


def front_ends(pid: int) -> list[int]:
    return [child for child in children(pid) if child not in engine_processes(pid)]


def connected_front_ends(pid: int) -> list[int]:
    """Those front ends that share memory with the engine process."""
    return [child for child in front_ends(pid) if b"/memfd:thirtytwo" in _read(child, "maps")]


def named_shared_memory() -> set[str]:
    """Segments that would outlast their processes, under the names that this service and multiprocessing use."""
    prefixes = ("thirtytwo", "psm_", "pymp-", "sem.mp-")
    return {path.name for path in Path("/dev/shm").iterdir() if path.name.startswith(prefixes)}  # noqa: S108


def _read(pid: int, file: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/{file}").read_bytes()
    except OSError:  # it has exited
        return b""


def wait_until(holds: Callable[[], bool], timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.1)
