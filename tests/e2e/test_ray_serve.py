"""The service on Ray Serve, on a cluster of two nodes on one machine.

The tests depend on each other: they follow one application from its first replica on.
"""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import ray
import yaml
from ray import serve
from ray.cluster_utils import Cluster
from ray.serve._private.common import DeploymentID
from ray.serve.context import _get_global_client  # no public API has a replica's node, process and metrics

from app.model.weights import BUNDLED
from app.settings import Settings
from deploy import ray_serve
from tests.support import fault_injection
from tests.support.images import WHITE
from tests.support.subprocesses import free_port

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]  # many processes, which start slowly on few cores

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {
    "PYTHONPATH": str(ROOT),
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_agent_register_timeout_ms": "120000",
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "120",
    "RAY_SERVE_PROXY_PREFER_LOCAL_NODE_ROUTING": "0",  # else the one proxy never uses the other node
}
NODE = {"num_cpus": 2, "node_ip_address": "127.0.0.1"}
CALLERS = 8

SPENT = re.compile(r'^thirtytwo_request_duration_seconds_sum{route="/predict"} (\S+)', re.MULTILINE)

Process = tuple[str, int]
HttpRequest = dict[str, Any]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        nodes = Cluster(initialize_head=True, head_node_args={**NODE, "include_dashboard": False})
        try:
            nodes.add_node(**NODE)
            ray.init(address=nodes.address, log_to_driver=False)
            yield nodes
            serve.shutdown()
        finally:
            ray.shutdown()
            nodes.shutdown()


@pytest.fixture(scope="module")
def run(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], str]:
    """Runs `serve run` with the shipped file, except for weights, port, the single proxy and faster scaling."""
    port = free_port()

    def run_with(weights: Path) -> str:
        config = yaml.safe_load((ROOT / "deploy" / "ray_serve.yaml").read_text())
        config["http_options"]["port"] = port
        # The proxies of both nodes would share one port, and clients would reach one that is still starting.
        config["proxy_location"] = "HeadOnly"
        (application,) = config["applications"]
        application["args"] |= {"weights": str(weights), "max_batch": 16}
        application["deployments"][0]["autoscaling_config"] |= {
            "max_replicas": 2,
            "target_ongoing_requests": 1,
            "look_back_period_s": 2,
            "upscale_delay_s": 0,
            "downscale_delay_s": 3600,
        }
        path = tmp_path_factory.mktemp("serve") / "config.yaml"
        path.write_text(yaml.safe_dump(config))
        command = [Path(sys.executable).with_name("serve"), "run", "--non-blocking", "--address", cluster.address, path]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return f"http://127.0.0.1:{port}"

    return run_with


@pytest.fixture(scope="module")
def url(run: Callable[[Path], str], tiny_weights: Path) -> str:
    address = run(tiny_weights)
    wait_for(lambda: status(lambda: httpx.get(f"{address}/readyz")) == 200)
    return address


def wait_for(condition: Callable[[], object], limit_s: float = 300) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, f"condition not met within {limit_s:g} s"
        time.sleep(0.2)


def predict(url: str, picture: bytes) -> httpx.Response:
    return httpx.post(f"{url}/predict", files={"file": ("x.png", picture)}, timeout=120)


def status(send: Callable[[], httpx.Response]) -> int:
    """0 if the connection broke."""
    try:
        return send().status_code
    except httpx.TransportError:
        return 0


def running(application: str = "thirtytwo") -> dict[str, Process]:
    """Node and process of each running replica, by id."""
    deployments = _get_global_client().get_serve_details()["applications"][application]["deployments"]
    found = deployments["Replica"]["replicas"] if deployments else []  # none while an update is prepared
    return {each["replica_id"]: (each["node_id"], each["pid"]) for each in found if each["state"] == "RUNNING"}


def reported_utilization() -> list[float]:
    """Of each replica, as the controller passes it to the autoscaling policy."""
    query = _get_global_client()._controller._get_metrics_for_deployment_for_testing
    metrics = ray.get(query.remote(DeploymentID("Replica", "thirtytwo")))
    return [sample.value for series in metrics.get("utilization", []) for sample in series] or [0.0]


@contextmanager
def under_load(url: str, cat: bytes) -> Iterator[list[Future[list[int]]]]:
    """Clients in closed loops; each future has one client's statuses in order."""
    stop = threading.Event()

    def call() -> list[int]:
        statuses = []
        while not stop.is_set():
            statuses.append(status(lambda: predict(url, cat)))
        return statuses

    with ThreadPoolExecutor(CALLERS) as pool:
        try:
            yield [pool.submit(call) for _ in range(CALLERS)]
        finally:
            stop.set()


def test_responses_equal_those_of_the_plain_service(url: str, client: httpx.Client, cat: bytes) -> None:
    form = [("file", (name, data)) for name, data in (("a.png", cat), ("b.txt", b"hello"), ("c.png", cat[:500]))]
    requests: list[HttpRequest] = [
        {"method": "POST", "url": "/predict", "files": form},
        {"method": "POST", "url": "/predict?top_k=10", "files": form[:1]},
        {"method": "POST", "url": "/predict", "content": cat, "headers": {"content-type": "image/png"}},
        {"method": "POST", "url": "/predict", "files": form[1:]},
        {"method": "POST", "url": "/predict?top_k=0", "files": form},
        {"method": "POST", "url": "/predict", "content": b"", "headers": {"content-type": "image/png"}},
        {"method": "POST", "url": "/predict", "content": b"{}", "headers": {"content-type": "application/json"}},
        {"method": "POST", "url": "/predict", "files": [("file", ("x.png", bytes(10_000_001)))]},
        {"method": "POST", "url": "/predict", "files": form[:1] * 257},
        {"method": "GET", "url": "/predict"},
        *({"method": "GET", "url": path} for path in ("/model", "/healthz", "/readyz", "/v2", "/", "/nothing")),
    ]
    with httpx.Client(base_url=url, timeout=60) as replica:
        for request in requests:
            plain, ours = client.request(**request), replica.request(**request)
            assert ours.status_code == plain.status_code, request
            assert content(ours) == content(plain)
            assert set(ours.headers) == set(plain.headers)
            assert ours.headers["content-type"] == plain.headers["content-type"]


def content(response: httpx.Response) -> object:
    if "json" not in response.headers["content-type"]:
        return response.text
    body = response.json()
    if response.is_error and "request_id" in body:
        assert body.pop("request_id") == response.headers["x-request-id"]
    return body


def test_request_id_is_returned_once(url: str) -> None:
    response = httpx.get(f"{url}/healthz", headers={"x-request-id": "my-id.1"}, timeout=60)
    assert response.headers.get_list("x-request-id") == ["my-id.1"]


def responding_replicas(url: str, cat: bytes) -> int:
    """The number of replicas that have responded; each has another sum of request durations."""
    with ThreadPoolExecutor(CALLERS) as pool:
        list(pool.map(lambda _: predict(url, cat), range(4 * CALLERS)))
    metrics = [httpx.get(f"{url}/metrics", timeout=60).text for _ in range(16)]
    return len(
        {
            spent
            for text in metrics
            for spent in re.findall(r'request_duration_seconds_sum{route="/predict"} (\S+)', text)
        }
    )


def test_load_starts_a_replica_on_the_other_node(url: str, cat: bytes) -> None:
    assert len(running()) == 1
    with under_load(url, cat) as callers:
        wait_for(lambda: len(running()) == 2)
    assert {status for caller in callers for status in caller.result()} == {200}
    assert len({node for node, _ in running().values()}) == 2
    wait_for(lambda: 0 < max(reported_utilization()) <= 1)
    wait_for(lambda: responding_replicas(url, cat) == 2)


def test_killed_replica_loses_its_requests_only(url: str, cat: bytes) -> None:
    before = running()
    with under_load(url, cat) as callers:
        killed, (_, process) = before.popitem()
        os.kill(process, signal.SIGKILL)
        wait_for(lambda: killed not in running() and len(running()) == 2)
    for caller in callers:
        assert sum(status != 200 for status in caller.result()) <= 1, "a client has one request in flight"


def test_rolling_update_loses_no_request(url: str, cat: bytes, run: Callable[[Path], str]) -> None:
    before = running()
    with under_load(url, cat) as callers:
        run(BUNDLED)
        wait_for(lambda: len(running()) == 2 and not before.keys() & running().keys())
    assert {status for caller in callers for status in caller.result()} == {200}
    assert httpx.get(f"{url}/model", timeout=60).json()["name"] == "cifar10"


def test_full_queue_is_429_and_stalled_replica_is_replaced(url: str, cat: bytes) -> None:
    settings = Settings(
        max_batch=1, max_queue=1, max_files=1, inference_timeout_s=5, request_timeout_s=100, root_path="/faulty"
    )
    application = ray_serve.replicas(
        settings, fault_injection.load(fault_injection.hanging), num_replicas=1, autoscaling_config=None
    )
    serve.run(application, name="faulty", route_prefix="/faulty")
    (before,) = running("faulty")
    with ThreadPoolExecutor() as pool:
        hangs = pool.submit(wait_for, lambda: predict(f"{url}/faulty", WHITE).status_code != 429)
        refused: list[httpx.Response] = []
        while not refused:
            answers = pool.map(lambda _: predict(f"{url}/faulty", cat), range(CALLERS))
            refused = [answer for answer in answers if answer.status_code == 429]
        hangs.result()
    for answer in refused:
        assert answer.headers["retry-after"] == "1"
        assert answer.headers["content-type"] == "text/plain; charset=utf-8"
    wait_for(lambda: before not in running("faulty") and len(running("faulty")) == 1)
    wait_for(lambda: predict(f"{url}/faulty", cat).status_code == 200)
