"""`python -m app` as a process: signals, exit codes, one line for what is wrong."""

import os
import signal
import socket
import subprocess
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from app.model import weights
from app.settings import Settings
from tests.support.raw_http import send_half
from tests.support.subprocesses import children, command, connected_front_ends, fails, front_ends, process, wait_until

pytestmark = pytest.mark.slow  # starts processes

PAGE = os.sysconf("SC_PAGE_SIZE")


def test_wrong_setting_is_one_line() -> None:
    assert fails(THIRTYTWO_MAX_BATCH="none") == (
        "error: THIRTYTWO_MAX_BATCH: Input should be a valid integer, unable to parse string as an integer\n"
    )


def test_flag_has_precedence_over_the_environment() -> None:
    assert "THIRTYTWO_PORT" in fails("--port", "x", THIRTYTWO_PORT="8000")


def test_broken_weights_file_is_one_line(tmp_path: Path, tiny_weights: Path) -> None:
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(tiny_weights.read_bytes()[:1000])
    for file, message in ((cut, "is not a safetensors file, or is cut off"), (tmp_path / "x", "cannot be read")):
        lines = [line for line in fails("--weights", str(file), "--port", "0").splitlines() if "ERROR" in line]
        assert message in lines[0]


@pytest.mark.parametrize("workers", ["1", "2"])
def test_missed_references_are_one_line(tmp_path: Path, tiny_weights: Path, workers: str) -> None:
    wrong, tiny = tmp_path / "wrong.safetensors", weights.load(tiny_weights)
    weights.save(wrong, tiny.card, tiny.state, tiny.reference_images, 1 - tiny.reference_probabilities)
    found = fails("--weights", str(wrong), "--port", "0", "--workers", workers)
    errors = [line for line in found.splitlines() if f"{wrong}: The output of torch on cpu" in line]
    assert len(errors) == 1
    assert "differs from the file's reference probabilities by" in errors[0]


def test_missing_device_is_one_line(tiny_weights: Path) -> None:
    assert "THIRTYTWO_DEVICE, THIRTYTWO_ENGINE, THIRTYTWO_PRECISION: cuda:7 is not available" in fails(
        "--weights", str(tiny_weights), "--device", "cuda:7", "--port", "0"
    )


@pytest.mark.parametrize("workers", ["1", "2"])
def test_port_in_use_is_one_line(tiny_weights: Path, workers: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        flags = ("--weights", str(tiny_weights), "--port", str(port), "--workers", workers)
        assert "address already in use" in fails(*flags).lower()


def test_help_lists_every_setting() -> None:
    text = subprocess.run(command("--help"), capture_output=True, text=True, check=True).stdout
    for name in Settings.model_fields:
        assert f"--{name.replace('_', '-')} " in text
        assert f"THIRTYTWO_{name.upper()}" in text.replace("\n", "").replace(" ", "")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("workers", [1, 2])
def test_signal_drains_and_exits_with_0(tiny_weights: Path, cat: bytes, number: signal.Signals, workers: int) -> None:
    outcomes: list[int] = []
    stop = threading.Event()

    def load(url: str) -> None:
        with httpx.Client(base_url=url, timeout=30) as client:
            while not stop.is_set():
                try:
                    response = client.post("/predict", files=[("file", ("cat.png", cat))] * 8)
                    outcomes.append(response.status_code)
                except httpx.ConnectError:  # between two requests, after the shutdown
                    return
                except httpx.TransportError:
                    outcomes.append(0)
                    return
                if response.headers.get("connection") == "close":
                    return

    with process(tiny_weights, "--workers", str(workers)) as (running, url):
        threads = [threading.Thread(target=load, args=(url,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        while outcomes.count(200) <= 10 and 0 not in outcomes:
            time.sleep(0.05)
        running.send_signal(number)
        _, log = running.communicate(timeout=30)
        stop.set()
        for thread in threads:
            thread.join()
    assert running.returncode == 0, log
    assert outcomes.count(200) > 10
    assert set(outcomes) <= {200, 503}, log


def test_workers_exit_when_the_supervisor_is_killed(tiny_weights: Path) -> None:
    with process(tiny_weights, "--workers", "2") as (running, url):
        assert len(children(running.pid)) == 3
        running.kill()
        _, log = running.communicate(timeout=30)  # ends with the last process that holds this end of the pipe
        assert log.count("parent process exited") == 2
        assert "Traceback" not in log
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{url}/healthz")


def test_workers_share_metrics_and_a_killed_one_is_replaced(tiny_weights: Path, cat: bytes) -> None:
    with process(tiny_weights, "--workers", "2") as (running, url):

        def told(name: str) -> float:
            """The sum over all labels."""
            lines = [line for line in httpx.get(f"{url}/metrics").text.splitlines() if line.startswith(name)]
            assert lines
            return sum(float(line.rpartition(" ")[2]) for line in lines)

        def counted() -> float:
            return told("thirtytwo_predictions_total")

        def ask() -> int:
            return httpx.post(f"{url}/predict", content=cat, headers={"content-type": "image/png"}).status_code

        assert [ask() for _ in range(30)] == [200] * 30
        wait_until(lambda: counted() == 30.0)  # counted after the response
        wait_until(lambda: len(connected_front_ends(running.pid)) == 2)
        assert {counted() for _ in range(8)} == {30.0}
        workers = front_ends(running.pid)
        pages = [int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in children(running.pid)]
        assert len(pages) == 3
        assert told("process_resident_memory_bytes") == pytest.approx(sum(pages) * PAGE, rel=0.1)
        assert 3 < told("thirtytwo_confidence_sum_total") <= 30
        os.kill(workers[0], signal.SIGKILL)
        assert ask() == 200
        deadline = time.monotonic() + 30
        while len(set(front_ends(running.pid)) - {workers[0]}) < 2:
            assert time.monotonic() < deadline
            assert ask() == 200
            time.sleep(0.2)
        before = counted()
        assert before >= 31
        wait_until(lambda: "thirtytwo_queue_size 0.0" in httpx.get(f"{url}/metrics").text)
        running.terminate()
        running.communicate(timeout=30)
        assert running.returncode == 0


def test_killed_worker_loses_only_its_requests_in_flight(tiny_weights: Path, cat: bytes) -> None:
    """Each caller has one request at a time under way, so it loses one at most."""
    stop = threading.Event()

    def load(url: str) -> Counter[int]:
        """The statuses; 0 counts what was lost."""
        statuses: Counter[int] = Counter()
        with httpx.Client(base_url=url, timeout=30) as client:
            while not stop.is_set():
                try:
                    statuses[client.post("/predict", files=[("file", ("cat.png", cat))] * 8).status_code] += 1
                except httpx.TransportError:
                    statuses[0] += 1
        return statuses

    with process(tiny_weights, "--workers", "2", stderr=subprocess.DEVNULL) as (running, url):
        victim = front_ends(running.pid)[0]
        with ThreadPoolExecutor(6) as pool:
            callers = [pool.submit(load, url) for _ in range(6)]
            time.sleep(1)
            os.kill(victim, signal.SIGKILL)
            time.sleep(2)
            stop.set()
        counts = [caller.result() for caller in callers]
    assert all(set(statuses) <= {0, 200} and statuses[0] <= 1 for statuses in counts), counts
    assert sum(statuses[200] for statuses in counts) > 10


def test_shutdown_refuses_new_and_answers_accepted_requests(tiny_weights: Path, cat: bytes) -> None:
    """A request that is still being sent when the stop begins is answered; one that begins then gets 503."""
    with process(tiny_weights) as (running, url):
        with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) as slow:
            send_half(slow, cat)
            running.send_signal(signal.SIGTERM)
            wait_until(lambda: httpx.get(f"{url}/readyz").status_code == 503)
            refused = httpx.post(f"{url}/predict", content=cat, headers={"content-type": "image/png"})
            assert refused.status_code == 503
            assert int(refused.headers["retry-after"]) >= 1
            assert httpx.get(f"{url}/v2/health/ready").json() == {"error": "The service is shutting down."}
            assert httpx.post(f"{url}/v2/repository/index").json()[0]["state"] == "UNAVAILABLE"
            refused = httpx.post(f"{url}/v2/models/tiny/infer", content=b"{}")
            assert refused.status_code == 503
            assert refused.json() == {"error": "The service is shutting down."}
            slow.sendall(cat[100:])
            assert slow.recv(100).startswith(b"HTTP/1.1 200")
        assert running.wait(10) == 0
