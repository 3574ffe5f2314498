"""Several worker processes: failed starts, restarts, pauses."""

import os
import shutil
import signal
import time
from pathlib import Path

import httpx
import pytest

from tests.support.subprocesses import children, fails, free_port, process, wait_until

pytestmark = pytest.mark.slow  # starts processes


def test_workers_that_all_fail_to_start_exit_with_2(tmp_path: Path) -> None:
    log = fails("--weights", str(tmp_path / "none"), "--port", str(free_port()), "--workers", "3")
    assert log.count("cannot be read") == 3


def test_broken_weights_file_leaves_healthy_workers(tiny_weights: Path, tmp_path: Path) -> None:
    """The replaced worker cannot start until the file is whole again; the other one serves meanwhile."""
    weights = tmp_path / "weights.safetensors"
    shutil.copy(tiny_weights, weights)
    with process(weights, "--workers", "2") as (running, url):
        wait_until(lambda: len(children(running.pid)) == 2)
        victim, healthy = children(running.pid)
        weights.write_bytes(tiny_weights.read_bytes()[:1000])
        os.kill(victim, signal.SIGKILL)
        seen: set[int] = set()

        def failed_twice() -> bool:
            assert httpx.get(f"{url}/readyz").status_code == 200
            seen.update(children(running.pid))
            return len(seen - {victim, healthy}) >= 2

        wait_until(failed_twice)
        assert healthy in children(running.pid)
        shutil.copy(tiny_weights, weights)
        wait_until(lambda: len({httpx.get(f"{url}/readyz").status_code, *children(running.pid)} - {200}) == 2)
        time.sleep(1)
        running.terminate()
        _, log = running.communicate(timeout=30)
    assert running.returncode == 0, log
    assert "exited with status 3; next start in 2 s" in log


def test_paused_workers_are_not_killed(tiny_weights: Path) -> None:
    with process(tiny_weights, "--workers", "2", start_new_session=True) as (running, url):
        wait_until(lambda: len(children(running.pid)) == 2)
        before = children(running.pid)
        time.sleep(2)
        os.killpg(running.pid, signal.SIGSTOP)
        time.sleep(6)
        os.killpg(running.pid, signal.SIGCONT)
        time.sleep(2)
        assert children(running.pid) == before
        assert httpx.get(f"{url}/readyz").status_code == 200
        running.terminate()
        assert running.wait(30) == 0
