"""Prometheus scrapes the running service with the shipped configuration, at a shorter interval."""

import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from app.settings import Settings
from tests.conftest import EXAMPLES, serving
from tests.support import fault_injection
from tests.support.images import WHITE
from tests.support.monitoring import PROMETHEUS, queries, rules, without_variables
from tests.support.subprocesses import free_port

pytestmark = pytest.mark.skipif(not shutil.which("prometheus"), reason="Debian's prometheus package is not installed")

WITHIN_S = 60
OPTIONAL = ("device_memory", "expected_exit_share", "key_images", "shadow")  # metrics of a GPU, cascade, key or shadow
RAW = {"Inference-Header-Content-Length": "0"}


class Monitored:
    """A service whose engine fails on a white image, and the Prometheus that scrapes it."""

    def __init__(self, service: httpx.Client, prometheus: httpx.Client, stop: Callable[[], None]) -> None:
        self.service = service
        self.prometheus = prometheus
        self.stop = stop

    def query(self, path: str, **parameters: str) -> Any:
        answer = self.prometheus.get(f"/api/v1/{path}", params=parameters)
        assert answer.status_code == 200, answer.text
        return answer.json()["data"]

    def rules(self) -> list[dict[str, Any]]:
        return [rule for group in self.query("rules")["groups"] for rule in group["rules"]]

    def alerting(self) -> set[str]:
        """Pending or firing."""
        return {alert["labels"]["alertname"] for alert in self.query("alerts")["alerts"]}


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WITHIN_S
    while not holds():
        assert time.monotonic() < deadline, f"condition not met within {WITHIN_S} s"
        time.sleep(0.3)


def is_ready(prometheus: httpx.Client) -> bool:
    try:
        return prometheus.get("/-/ready").status_code == 200
    except httpx.TransportError:
        return False


def configuration(port: int) -> dict[str, Any]:
    shipped: dict[str, Any] = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())
    shipped["global"] = dict.fromkeys(shipped["global"], "1s")
    shipped["rule_files"] = [str(PROMETHEUS / name) for name in shipped["rule_files"]]
    (job,) = shipped["scrape_configs"]
    job["static_configs"] = [{"targets": [f"127.0.0.1:{port}"]}]
    return shipped


@pytest.fixture(scope="module")
def monitored(baseline_weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Monitored]:
    folder, port = tmp_path_factory.mktemp("prometheus"), free_port()
    flags = [f"--config.file={folder}/config.yml", f"--storage.tsdb.path={folder}/data", "--log.level=warn"]
    with ExitStack() as service_stack, httpx.Client(base_url=f"http://127.0.0.1:{port}") as prometheus:
        settings = Settings(weights=baseline_weights, max_batch=16)
        service = service_stack.enter_context(serving(settings, fault_injection.load(fault_injection.raising)))
        (folder / "config.yml").write_text(yaml.safe_dump(configuration(service.base_url.port or 0)))
        running = subprocess.Popen(["prometheus", *flags, f"--web.listen-address=127.0.0.1:{port}"])
        try:
            until(lambda: is_ready(prometheus))
            yield Monitored(service, prometheus, service_stack.close)
        finally:
            running.terminate()
            running.wait(30)


def test_rules_load_and_stay_silent_for_a_healthy_service(monitored: Monitored, cat: bytes) -> None:
    monitored.service.post("/predict", content=cat, headers={"content-type": "image/png"})
    until(lambda: {rule["health"] for rule in monitored.rules()} == {"ok"})
    assert [rule["name"] for rule in monitored.rules()] == [rule["alert"] for rule in rules()]
    until(lambda: [target["health"] for target in monitored.query("targets")["activeTargets"]] == ["up"])
    until(lambda: monitored.alerting() == set())  # before the first scrape, ThirtytwoDown is pending


def test_failures_raise_alerts_and_panels_have_data(monitored: Monitored) -> None:
    def alerted() -> bool:
        monitored.service.post("/v2/models/tiny_image/infer", content=WHITE, headers=RAW)
        monitored.service.post("/v2/models/tiny_image/infer", content=b"no picture", headers=RAW)
        monitored.service.post("/predict", content=b"no picture", headers={"content-type": "image/png"})
        return monitored.alerting() >= {"ThirtytwoErrors", "ThirtytwoBadFiles"}

    until(alerted)
    pictures = [("file", (path.name, path.read_bytes())) for path in sorted(EXAMPLES.glob("*.png"))] * 20

    def shown() -> bool:
        monitored.service.post("/predict", files=pictures)
        return all(finite(monitored, query) for query in queries() if not any(name in query for name in OPTIONAL))

    until(shown)
    assert monitored.query("label/instance/values", **{"match[]": "thirtytwo_model_info"}) != []


def finite(monitored: Monitored, query: str) -> bool:
    """Whether the panel's query returns at least one number."""
    results = monitored.query("query", query=without_variables(query, "1m"))["result"]
    return any(float(result["value"][1]) == float(result["value"][1]) for result in results)


def test_changed_images_raise_an_alert(monitored: Monitored, cat: bytes) -> None:
    def alerted() -> bool:
        assert monitored.service.post("/predict", files=[("file", ("cat.png", cat))] * 250).status_code == 200
        return "ThirtytwoDrift" in monitored.alerting()

    until(alerted)


def test_stopped_service_raises_an_alert(monitored: Monitored) -> None:
    monitored.stop()
    until(lambda: "ThirtytwoDown" in monitored.alerting())
