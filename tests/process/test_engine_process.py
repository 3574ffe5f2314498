"""Front ends and the engine process as processes: exits of either side under load, drain, metrics, deadlines."""

import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from tests.support.images import WHITE
from tests.support.subprocesses import (
    children,
    connected_front_ends,
    engine_processes,
    fails,
    faulty_process,
    free_port,
    front_ends,
    named_shared_memory,
    process,
    wait_until,
)

pytestmark = pytest.mark.slow  # starts processes

RAW = {"content-type": "image/png"}


def ask(url: str, image: bytes, timeout_s: float = 30.0) -> int:
    """The status; 0 where the connection was closed."""
    try:
        return httpx.post(f"{url}/predict", content=image, headers=RAW, timeout=timeout_s).status_code
    except httpx.TransportError:
        return 0


@contextmanager
def load(url: str, image: bytes, clients: int = 4) -> Iterator[Counter[int]]:
    """Requests from several clients meanwhile, counted by status."""
    statuses: Counter[int] = Counter()
    stop = threading.Event()

    def send() -> None:
        while not stop.is_set():
            statuses[ask(url, image)] += 1

    with ThreadPoolExecutor(clients) as pool:
        senders = [pool.submit(send) for _ in range(clients)]
        try:
            yield statuses
        finally:
            stop.set()
        for sender in senders:
            sender.result()


def test_front_ends_load_no_engine_library(tiny_weights: Path, cat: bytes) -> None:
    with process(tiny_weights, "--workers", "2") as (running, url):
        assert [ask(url, cat) for _ in range(8)] == [200] * 8
        wait_until(lambda: len(children(running.pid)) == 3)
        assert len(engine_processes(running.pid)) == 1
        for pid in front_ends(running.pid):
            maps = Path(f"/proc/{pid}/maps").read_text()
            assert "torch" not in maps
            assert "openvino" not in maps


def test_responses_equal_those_of_one_process(tiny_weights: Path, cat: bytes) -> None:
    def responses(workers: str) -> list[object]:
        with process(tiny_weights, "--workers", workers) as (_, url), ThreadPoolExecutor(8) as pool:
            files = [("file", ("cat.png", cat))] * 5
            sent = [pool.submit(httpx.post, f"{url}/predict?top_k=10", files=files, timeout=30) for _ in range(16)]
            return [each.result().json() for each in sent]

    (one,) = {str(response) for response in responses("1")}
    assert {str(response) for response in responses("2")} == {one}


def test_killed_engine_process_is_replaced_with_its_front_ends(tiny_weights: Path, cat: bytes) -> None:
    shared_memory = named_shared_memory()
    # without access lines, which nobody reads: a full pipe drops lines
    with process(tiny_weights, "--workers", "2", "--log-level", "warning") as (running, url):
        before = set(children(running.pid))
        (engine,) = engine_processes(running.pid)
        with load(url, cat) as statuses:
            wait_until(lambda: statuses[200] > 20)
            os.kill(engine, signal.SIGKILL)
            wait_until(lambda: len(set(children(running.pid)) - before) == 3)
            answered = statuses[200]
            wait_until(lambda: statuses[200] > answered + 20)
        assert set(statuses) <= {200, 503, 0}
        assert not before & set(children(running.pid))
        assert [ask(url, cat) for _ in range(10)] == [200] * 10
        running.terminate()
        _, log = running.communicate(timeout=30)
    assert running.returncode == 0, log
    assert f"engine process {engine} exited with status -9" in log
    assert "Traceback" not in log
    wait_until(lambda: named_shared_memory() <= shared_memory)  # other tests of the machine have some, too


def test_killed_front_end_leaves_the_engine_process(tiny_weights: Path, cat: bytes) -> None:
    with process(tiny_weights, "--workers", "2") as (running, url):
        (engine,) = engine_processes(running.pid)
        wait_until(lambda: len(connected_front_ends(running.pid)) == 2)
        descriptors = len(os.listdir(f"/proc/{engine}/fd"))
        victim, other = front_ends(running.pid)
        with load(url, cat) as statuses:
            wait_until(lambda: statuses[200] > 20)
            os.kill(victim, signal.SIGKILL)
            wait_until(lambda: victim not in children(running.pid) and len(connected_front_ends(running.pid)) == 2)
            answered = statuses[200]
            wait_until(lambda: statuses[200] > answered + 20)
        assert statuses[0] <= 4 + 2  # one of each client, and connections that the victim had accepted
        assert set(statuses) <= {200, 0}
        assert {engine, other} < set(children(running.pid))
        victim = front_ends(running.pid)[-1]
        os.kill(victim, signal.SIGKILL)
        wait_until(lambda: victim not in children(running.pid) and len(connected_front_ends(running.pid)) == 2)
        assert [ask(url, cat) for _ in range(8)] == [200] * 8
        wait_until(lambda: len(os.listdir(f"/proc/{engine}/fd")) <= descriptors)


def test_stopped_service_leaves_no_process(tiny_weights: Path, cat: bytes) -> None:
    with process(tiny_weights, "--workers", "2") as (running, _):
        pids = children(running.pid)
        running.kill()
        running.communicate(timeout=30)  # ends with the last process that holds the pipe
        wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids))


def test_engine_process_outlasts_draining_front_ends(tiny_weights: Path) -> None:
    """Every process gets SIGTERM; the front ends still answer what they have accepted."""
    names = "THIRTYTWO_INFERENCE_TIMEOUT_S", "THIRTYTWO_REQUEST_TIMEOUT_S", "TEST_SHUTDOWN_TIMEOUT_S"
    limits = dict.fromkeys(names, "60")
    with faulty_process("slow", tiny_weights, workers=2, **limits) as (running, url), ThreadPoolExecutor(4) as pool:
        files = [("file", ("x.png", WHITE))] * 64  # 0.01 s each
        sent = [pool.submit(httpx.post, f"{url}/predict", files=files, timeout=30) for _ in range(4)]
        time.sleep(1)
        for pid in [*children(running.pid), running.pid]:
            os.kill(pid, signal.SIGTERM)
        assert Counter(each.result().status_code for each in sent) == {200: 4}
        _, log = running.communicate(timeout=30)
    assert running.returncode == 0, log


def test_engine_process_reports_batches_and_memory(tiny_weights: Path, cat: bytes) -> None:
    with process(tiny_weights, "--workers", "2") as (running, url):

        def value(name: str) -> float:
            lines = httpx.get(f"{url}/metrics").text.splitlines()
            return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))

        assert [ask(url, cat) for _ in range(20)] == [200] * 20
        wait_until(lambda: value("thirtytwo_batch_size_sum") == 20)
        assert value("thirtytwo_inference_seconds_count") == 20
        wait_until(lambda: value("thirtytwo_predictions_total") == 20)
        wait_until(lambda: value('thirtytwo_requests_total{route="/predict"') == 20)  # counted after the response
        assert value("thirtytwo_model_info") == 1
        assert value("thirtytwo_capacity_images_per_second") > 0
        wait_until(lambda: value('thirtytwo_utilization_ratio{resource="engine"') > 0)  # of the engine process
        wait_until(lambda: value('thirtytwo_utilization_ratio{resource="event_loop"') > 0)  # of a front end
        resident = sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in children(running.pid))
        assert value("process_resident_memory_bytes") == pytest.approx(resident * os.sysconf("SC_PAGE_SIZE"), rel=0.1)


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("lost", "inference failed: CUDA error: device-side assert triggered; exiting"),
        ("hanging", "inference thread stalled for"),
        ("dying", "inference thread died"),
    ],
)
def test_failed_engine_is_replaced(tiny_weights: Path, cat: bytes, fault: str, reason: str) -> None:
    with faulty_process(fault, tiny_weights, workers=2) as (running, url):
        before = set(children(running.pid))
        assert ask(url, WHITE) == 503
        wait_until(lambda: not before & set(children(running.pid)) and ask(url, cat) == 200)
        running.terminate()
        _, log = running.communicate(timeout=30)
    assert reason in log
    assert "exited with status 1; next start in" in log, log


@pytest.mark.parametrize("fault", ["raising", "poisoned"])
def test_bad_image_fails_alone_behind_front_ends(tiny_weights: Path, cat: bytes, fault: str) -> None:
    limit = {"THIRTYTWO_INFERENCE_TIMEOUT_S": "60"}
    with faulty_process(fault, tiny_weights, workers=2, **limit) as (running, url), ThreadPoolExecutor(16) as pool:
        before = set(children(running.pid))
        images = [WHITE if i % 8 == 3 else cat for i in range(48)]
        statuses = list(pool.map(lambda image: ask(url, image), images))
        assert statuses == [500 if i % 8 == 3 else 200 for i in range(48)]
        assert set(children(running.pid)) == before


def test_deadline_does_not_wait_for_the_engine_process(tiny_weights: Path, cat: bytes) -> None:
    with process(tiny_weights, "--workers", "2", "--request-timeout-s", "1") as (running, url):
        (engine,) = engine_processes(running.pid)
        os.kill(engine, signal.SIGSTOP)
        started = time.monotonic()
        assert ask(url, cat) == 504
        assert time.monotonic() - started < 8
        os.kill(engine, signal.SIGCONT)
        wait_until(lambda: [ask(url, cat) for _ in range(4)] == [200] * 4)


def test_engine_that_cannot_start_is_one_line(tmp_path: Path) -> None:
    log = fails("--weights", str(tmp_path / "none"), "--port", str(free_port()), "--workers", "3")
    assert log.count("cannot be read") == 1
    assert "does not answer" not in log
