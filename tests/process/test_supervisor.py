"""Several worker processes: failed starts, restarts, pauses."""

import os
import shutil
import signal
import time
from pathlib import Path

import httpx
import pytest

from app.commands.serve import server_config
from app.process.supervisor import Supervisor
from app.settings import Settings
from tests.support.subprocesses import children, engine_processes, front_ends, process, wait_until

pytestmark = pytest.mark.slow  # starts processes


def test_signal_between_the_starts_of_workers_ends_them(tiny_weights: Path) -> None:
    settings = Settings(weights=tiny_weights, workers=3)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    supervisor = Supervisor(server_config(settings), [], settings)
    for number, handler in handlers.items():
        signal.signal(number, handler)
    supervisor.should_exit.set()
    supervisor.init_processes()
    supervisor.terminate_all()
    supervisor.join_all()
    assert not supervisor.processes


def test_broken_weights_file_leaves_the_front_ends(tiny_weights: Path, tmp_path: Path) -> None:
    """A replaced front end has the model from the engine process, which has read the file."""
    weights = tmp_path / "weights.safetensors"
    shutil.copy(tiny_weights, weights)
    with process(weights, "--workers", "2") as (running, url):
        wait_until(lambda: len(front_ends(running.pid)) == 2)
        victim = front_ends(running.pid)[0]
        weights.write_bytes(tiny_weights.read_bytes()[:1000])
        os.kill(victim, signal.SIGKILL)
        wait_until(lambda: victim not in children(running.pid) and len(front_ends(running.pid)) == 2)
        assert {httpx.get(f"{url}/model").status_code for _ in range(8)} == {200}


def test_engine_process_starts_again_when_the_file_is_whole(tiny_weights: Path, tmp_path: Path) -> None:
    weights = tmp_path / "weights.safetensors"
    shutil.copy(tiny_weights, weights)
    log = tmp_path / "log"
    with log.open("w") as stream, process(weights, "--workers", "2", stderr=stream) as (running, url):
        running.send_signal(signal.SIGHUP)
        wait_until(lambda: "SIGHUP: reloading" in log.read_text())  # the supervisor has seen that a worker is ready
        weights.write_bytes(tiny_weights.read_bytes()[:1000])
        os.kill(engine_processes(running.pid)[0], signal.SIGKILL)
        wait_until(lambda: log.read_text().count("exited with status 3; next start in") >= 2)
        shutil.copy(tiny_weights, weights)

        def serves() -> bool:
            try:
                return httpx.get(f"{url}/readyz", timeout=1).status_code == 200
            except httpx.TransportError:
                return False

        wait_until(serves)
        running.terminate()
        assert running.wait(30) == 0, log.read_text()


def test_paused_workers_are_not_killed(tiny_weights: Path) -> None:
    with process(tiny_weights, "--workers", "2", start_new_session=True) as (running, url):
        wait_until(lambda: len(children(running.pid)) == 3)
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
