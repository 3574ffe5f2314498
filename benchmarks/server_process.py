"""Servers under test as processes: start, readiness, CPU time and memory."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple
from urllib.request import urlopen

ROOT = Path(__file__).parents[1]
TICKS_PER_S = os.sysconf("SC_CLK_TCK")
START_TIMEOUT_S = 60.0


class ServerProcess(NamedTuple):
    """A running server and its workers, read from /proc. `ready_s`: seconds from the command to the first 200."""

    pid: int
    port: int
    ready_s: float

    def pids(self) -> list[int]:
        children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
        return [self.pid, *map(int, children)]

    def cpu_s(self) -> float:
        fields = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() for pid in self.pids()]
        return sum(int(field[11]) + int(field[12]) for field in fields) / TICKS_PER_S

    def memory_mb(self, field: str = "VmRSS") -> float:
        """Resident memory, or its peak (VmHWM)."""
        lines = [line for pid in self.pids() for line in Path(f"/proc/{pid}/status").read_text().splitlines()]
        return sum(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024

    def descriptors(self) -> int:
        return sum(len(os.listdir(f"/proc/{pid}/fd")) for pid in self.pids())


@contextmanager
def running(command: list[str], port: int, path: str = "/readyz") -> Iterator[ServerProcess]:
    """The server once `path` answers 200; stopped by SIGTERM. Raises RuntimeError if it does not start."""
    start = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
    try:
        while not is_ready(port, path):
            if process.poll() is not None or time.perf_counter() - start > START_TIMEOUT_S:
                raise RuntimeError(f"{' '.join(command)} did not start")
            time.sleep(0.01)
        yield ServerProcess(process.pid, port, time.perf_counter() - start)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)


def is_ready(port: int, path: str = "/readyz") -> bool:
    try:
        with urlopen(f"http://127.0.0.1:{port}{path}", timeout=1) as response:
            return bool(response.status == 200)
    except OSError:
        return False


def service(port: int, *flags: str) -> list[str]:
    """The command of the service with the bundled weights."""
    return [sys.executable, "-m", "app", "--port", str(port), *flags]


def bare_asgi(port: int) -> list[str]:
    """The command of uvicorn with `benchmarks.bare_asgi`."""
    options = ["--port", str(port), "--no-access-log", "--log-level", "warning", "--http", "httptools"]
    return [sys.executable, "-m", "uvicorn", "benchmarks.bare_asgi:app", *options]
