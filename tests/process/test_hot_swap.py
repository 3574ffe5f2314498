"""New weights without a gap, over HTTP: under load, by every trigger, and with several workers."""

import itertools
import os
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import httpx
import numpy as np
import pytest
import tritonclient.http as triton
from prometheus_client.parser import text_string_to_metric_families

from app.model import weights
from app.settings import Settings
from tests.conftest import CLASSES, EXAMPLES, serving, untrained, write
from tests.support.subprocesses import children, connected_front_ends, front_ends, process, wait_until

KEY = {"x-api-key": "secret"}
LOAD = "/v2/repository/models/{}/load"
FILES = [(EXAMPLES / f"{name}.png").read_bytes() for name in ("cat", "ship", "chelsea")]
WANTED = {"top_k": 2}
MODELS = [  # other classes, another number of them, and another input size
    untrained("served", 8),
    untrained("served", 8, [f"class {i}" for i in range(30)], 16, seed=1),
    untrained("served", 16, CLASSES[::-1], 48, seed=2),
]


class Version(NamedTuple):
    """A weights file, and what `/predict` and `/v2` answer for FILES from it."""

    path: Path
    version: str
    predictions: list[dict[str, Any]]
    probabilities: list[float]


@pytest.fixture(scope="module")
def versions(tmp_path_factory: pytest.TempPathFactory) -> list[Version]:
    folder = tmp_path_factory.mktemp("versions")
    found = []
    for index, model in enumerate(MODELS):
        path = folder / f"{index}.safetensors"
        write(path, model)
        with serving(Settings(weights=path, max_batch=16)) as client:
            predictions = predict(client).json()["predictions"]
            found.append(Version(path, weights.load(path).version, predictions, infer(client)))
    return found


def predict(client: httpx.Client, files: list[bytes] = FILES) -> httpx.Response:
    form = [("file", ("x.png", file)) for file in files]
    return client.post("/predict", params=WANTED, files=form, headers=KEY)


def infer(client: httpx.Client) -> list[float]:
    headers = {"Inference-Header-Content-Length": "0", **KEY}
    response = client.post("/v2/models/served_image/infer", content=FILES[0], headers=headers)
    assert response.status_code == 200, response.text
    length = int(response.headers["inference-header-content-length"])
    return np.frombuffer(response.content[length:], np.float32).tolist()


def replace(path: Path, version: Version) -> None:
    """A rename into place."""
    copy = path.with_name("copy")
    copy.write_bytes(version.path.read_bytes())
    copy.replace(path)


def served(client: httpx.Client) -> str:
    version: str = client.get("/model").json()["version"]
    return version


def loads(client: httpx.Client) -> dict[str, float]:
    return {
        sample.labels["outcome"]: sample.value
        for family in text_string_to_metric_families(client.get("/metrics").text)
        for sample in family.samples
        if sample.name == "thirtytwo_model_loads_total" and sample.value
    }


class Traffic:
    """Callers that send requests of several sizes until `stop`; every response is checked."""

    def __init__(self, url: httpx.URL, versions: list[Version], callers: int = 6) -> None:
        self.sent, self.answered = itertools.count(), itertools.count()
        self.seen: set[str] = set()
        self._url = url
        self._versions = {each.version: each for each in versions}
        self._stop = threading.Event()
        self._pool = ThreadPoolExecutor(callers)
        self._callers = [self._pool.submit(self._send, Random(seed)) for seed in range(callers)]  # noqa: S311

    def stop(self) -> tuple[int, int]:
        """Requests sent and answered; raises what failed."""
        self._stop.set()
        for caller in self._callers:
            caller.result(60)
        self._pool.shutdown()
        return next(self.sent), next(self.answered)

    def _send(self, random: Random) -> None:
        with httpx.Client(base_url=self._url, timeout=30) as client:
            while not self._stop.is_set():
                next(self.sent)
                if random.random() < 0.2:
                    self._check_infer(infer(client))
                else:
                    self._check_predict(predict(client, FILES * random.randint(1, 8)))
                next(self.answered)

    def _check_predict(self, response: httpx.Response) -> None:
        """All predictions are those of the version that the response names."""
        assert response.status_code == 200, response.text
        body = response.json()
        version = body["model"]["version"]
        self.seen.add(version)
        for got, expected in zip(body["predictions"], itertools.cycle(self._versions[version].predictions)):
            assert got["label"] == expected["label"]
            assert [top["label"] for top in got["top"]] == [top["label"] for top in expected["top"]]
            assert got["confidence"] == pytest.approx(expected["confidence"], abs=2e-4)

    def _check_infer(self, probabilities: list[float]) -> None:
        assert any(probabilities == pytest.approx(each.probabilities, abs=1e-3) for each in self._versions.values())


@pytest.mark.slow
def test_no_request_is_lost_or_mixed_while_models_change_under_load(versions: list[Version], tmp_path: Path) -> None:
    path = tmp_path / "served.safetensors"
    replace(path, versions[0])
    with serving(Settings(weights=path, max_batch=16, weights_poll_s=0.05, max_queue=1024)) as client:
        traffic = Traffic(client.base_url, versions)
        for version in versions[1:] * 4 + [versions[0]]:
            replace(path, version)
            wait_until(lambda version=version: served(client) == version.version)
            time.sleep(0.2)
        sent, answered = traffic.stop()
        assert sent == answered > 30
        assert traffic.seen == {each.version for each in versions}
        assert loads(client) == {"success": 9}


@pytest.mark.slow
def test_statistics_survive_a_change_of_classes(versions: list[Version], tmp_path: Path) -> None:
    path = tmp_path / "served.safetensors"
    replace(path, versions[0])
    with serving(Settings(weights=path, max_batch=16, weights_poll_s=0.02)) as client:
        predict(client)
        replace(path, versions[1])
        wait_until(lambda: served(client) == versions[1].version)
        predict(client)
        counts = {
            sample.labels["label"]: sample.value
            for family in text_string_to_metric_families(client.get("/metrics").text)
            for sample in family.samples
            if sample.name == "thirtytwo_predictions_total"
        }
        assert set(counts) == {*CLASSES, *MODELS[1].card.classes}
        assert sum(counts[name] for name in CLASSES) == sum(counts[name] for name in MODELS[1].card.classes) == 3
        infos = [line for line in client.get("/metrics").text.splitlines() if line.startswith("thirtytwo_model_info{")]
        assert len(infos) == 1
        assert versions[1].version in infos[0]
        (statistics,) = client.get("/v2/models/served/stats").json()["model_stats"]
        assert statistics["inference_count"] == 6


@pytest.mark.slow
def test_the_repository_api_loads_with_a_key_only(versions: list[Version], tmp_path: Path) -> None:
    path = tmp_path / "served.safetensors"
    replace(path, versions[0])
    settings = Settings(weights=path, max_batch=16, weights_poll_s=0, api_keys="secret")
    with serving(settings) as client:
        load = LOAD.format("served")
        replace(path, versions[1])
        assert client.post(load).status_code == 401
        assert client.post(LOAD.format("other"), headers=KEY).status_code == 404
        assert served(client) == versions[0].version
        response = client.post(load, headers=KEY, json={})
        assert response.json() == {
            "name": "served",
            "version": "1",
            "parameters": {"weights_version": versions[1].version},
        }
        assert served(client) == versions[1].version
        assert client.get("/v2/models/served").json()["inputs"][0]["shape"] == [-1, 16, 16, 3]
        assert infer(client) == pytest.approx(versions[1].probabilities, abs=1e-3)
        assert client.post(LOAD.format("served_image"), headers=KEY).status_code == 200
        with closing(triton.InferenceServerClient(f"127.0.0.1:{client.base_url.port}")) as triton_client:
            replace(path, versions[2])
            triton_client.load_model("served", headers=KEY)
        assert served(client) == versions[2].version
        assert loads(client) == {"success": 2, "unchanged": 1}


@pytest.mark.slow
@pytest.mark.parametrize("body", ['{"parameters": {"config": "{}"}}', '{"parameters": {"file:1/x": ""}}', "[", "{"])
def test_a_load_has_no_other_parameters(versions: list[Version], tmp_path: Path, body: str) -> None:
    with serving(Settings(weights=versions[0].path, max_batch=1, weights_poll_s=0, api_keys="secret")) as client:
        response = client.post(LOAD.format("served"), headers=KEY, content=body)
        assert response.status_code == 400
        assert set(response.json()) == {"error"}
        assert loads(client) == {}


@pytest.mark.slow
@pytest.mark.parametrize("damage", [lambda data: data[:1000], lambda data: b"nothing", lambda data: data[:-1] + b"\7"])
def test_a_bad_file_leaves_the_model(versions: list[Version], tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    path = tmp_path / "served.safetensors"
    replace(path, versions[0])
    with serving(Settings(weights=path, max_batch=16, weights_poll_s=0.02, api_keys="secret")) as client:
        damaged = tmp_path / "damaged"
        damaged.write_bytes(damage(versions[1].path.read_bytes()))
        damaged.replace(path)
        wait_until(lambda: loads(client) == {"failure": 1})
        time.sleep(0.2)
        assert loads(client) == {"failure": 1}  # no further attempt with the same file
        refused = client.post(LOAD.format("served"), headers=KEY)
        assert (refused.status_code, versions[0].version in refused.json()["error"]) == (400, True)
        assert str(path) not in refused.text
        assert predict(client).json()["model"]["version"] == versions[0].version
        replace(path, versions[1])
        wait_until(lambda: served(client) == versions[1].version)


def all_serve(url: str, version: Version) -> bool:
    """Whether 20 connections, which two workers share, get this version."""
    with httpx.Client(base_url=url, limits=httpx.Limits(max_keepalive_connections=0)) as client:
        return all(served(client) == version.version for _ in range(20))


@pytest.mark.slow
@pytest.mark.parametrize("trigger", ["poll", "SIGHUP", "API"])
def test_every_worker_follows(versions: list[Version], tmp_path: Path, trigger: str) -> None:
    path = tmp_path / "served.safetensors"
    replace(path, versions[0])
    poll_s = "0.2" if trigger == "poll" else "0"
    environment = {**os.environ, "THIRTYTWO_API_KEYS": "secret", "THIRTYTWO_WEIGHTS_POLL_S": poll_s}
    with process(path, "--workers", "2", env=environment) as (running, url):
        assert all_serve(url, versions[0])
        replace(path, versions[1])
        if trigger == "SIGHUP":
            running.send_signal(signal.SIGHUP)
        elif trigger == "API":
            assert httpx.post(url + LOAD.format("served"), headers=KEY).status_code == 200
        wait_until(lambda: all_serve(url, versions[1]))
        running.terminate()
        assert running.wait(30) == 0


@pytest.mark.slow
def test_front_ends_lose_no_request_while_models_change(versions: list[Version], tmp_path: Path) -> None:
    path = tmp_path / "served.safetensors"
    replace(path, versions[0])
    environment = {**os.environ, "THIRTYTWO_WEIGHTS_POLL_S": "0.05", "THIRTYTWO_MAX_QUEUE": "1024"}
    with process(path, "--workers", "2", env=environment) as (running, url):
        wait_until(lambda: len(connected_front_ends(running.pid)) == 2)
        traffic = Traffic(httpx.URL(url), versions)
        for version in versions[1:] * 2 + [versions[0]]:
            replace(path, version)
            wait_until(lambda version=version: all_serve(url, version))
            time.sleep(0.2)
        sent, answered = traffic.stop()
        assert sent == answered > 30
        assert traffic.seen == {each.version for each in versions}
        with httpx.Client(base_url=url) as client:
            assert loads(client) == {"success": 2 * 5}
        running.terminate()
        assert running.wait(30) == 0


@pytest.mark.slow
def test_a_bad_file_leaves_the_model_of_front_ends(versions: list[Version], tmp_path: Path) -> None:
    path = tmp_path / "served.safetensors"
    replace(path, versions[0])
    environment = {**os.environ, "THIRTYTWO_API_KEYS": "secret", "THIRTYTWO_WEIGHTS_POLL_S": "0.1"}
    with process(path, "--workers", "2", env=environment) as (running, url), httpx.Client(base_url=url) as client:
        path.write_bytes(versions[1].path.read_bytes()[:1000])
        wait_until(lambda: loads(client) == {"failure": 2})
        refused = client.post(LOAD.format("served"), headers=KEY)
        assert (refused.status_code, versions[0].version in refused.json()["error"]) == (400, True)
        assert predict(client).json()["model"]["version"] == versions[0].version
        replace(path, versions[1])
        wait_until(lambda: all_serve(url, versions[1]))
        running.terminate()
        assert running.wait(30) == 0
        log = running.stderr.read()
        assert log.count(f"{versions[0].version} stays: ") == 3, log
        assert "Traceback" not in log


@pytest.mark.slow
def test_front_end_that_is_restarted_gets_the_new_model(versions: list[Version], tmp_path: Path) -> None:
    path = tmp_path / "served.safetensors"
    replace(path, versions[0])
    with process(path, "--workers", "2", env={**os.environ, "THIRTYTWO_WEIGHTS_POLL_S": "0.1"}) as (running, url):
        replace(path, versions[1])
        wait_until(lambda: all_serve(url, versions[1]))
        before = front_ends(running.pid)
        os.kill(before[0], signal.SIGKILL)
        wait_until(lambda: before[0] not in children(running.pid) and len(connected_front_ends(running.pid)) == 2)
        assert all_serve(url, versions[1])
        replace(path, versions[2])
        wait_until(lambda: all_serve(url, versions[2]))


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_shutdown_during_a_load_is_graceful(versions: list[Version], tmp_path: Path, workers: str) -> None:
    path = tmp_path / "served.safetensors"
    replace(path, versions[0])
    with process(path, "--workers", workers) as (running, _):
        replace(path, versions[1])
        running.send_signal(signal.SIGHUP)
        time.sleep(0.1)
        running.terminate()
        assert running.wait(30) == 0, running.stderr.read()


def resident_mb(pid: int) -> float:
    fields = Path(f"/proc/{pid}/statm").read_text().split()
    return int(fields[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["1", "2"])
def test_memory_does_not_grow_with_the_number_of_loads(versions: list[Version], tmp_path: Path, workers: str) -> None:
    path = tmp_path / "served.safetensors"
    replace(path, versions[0])
    environment = {**os.environ, "THIRTYTWO_API_KEYS": "secret", "THIRTYTWO_WEIGHTS_POLL_S": "0"}
    flags = path, "--workers", workers
    with process(*flags, env=environment) as (running, url), httpx.Client(base_url=url, timeout=60) as client:
        pids = children(running.pid) or [running.pid]

        def lowest_after(times: int) -> float:
            """The lowest sum in MB. Single readings differ by 20 MB, since the allocator keeps freed pages."""
            readings = []
            for version in itertools.islice(itertools.cycle(versions[1:]), times):
                replace(path, version)
                assert client.post(LOAD.format("served"), headers=KEY).status_code == 200
                predict(client)
                readings.append(sum(map(resident_mb, pids)))
            return min(readings[-10:])

        before, after = lowest_after(20), lowest_after(30)
        assert after - before < 40, (before, after)  # if the models were kept: 330
