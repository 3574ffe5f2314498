"""What the service promises when its parts fail."""

import asyncio
import http.client
import io
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
from PIL import Image

from app.api import routes
from app.errors import NotReady
from app.oip import routes as oip_routes
from app.process.lifecycle import Lifecycle, Phase
from app.settings import Settings
from app.state import State
from tests.conftest import EXAMPLES, serving
from tests.support import fault_injection
from tests.support.subprocesses import faulty_process


@pytest.fixture(scope="module")
def white() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32), "white").save(buffer, "PNG")
    return buffer.getvalue()


def ask(client: httpx.Client, *pictures: bytes) -> httpx.Response:
    return client.post("/predict?top_k=10", files=[("file", ("x.png", picture)) for picture in pictures])


@pytest.mark.slow
@pytest.mark.parametrize("fault", [fault_injection.raising, fault_injection.poisoned])
def test_only_the_guilty_request_fails_and_nothing_of_the_fault_is_told(
    tiny_weights: Path, cat: bytes, white: bytes, fault: fault_injection.Fault
) -> None:
    settings = Settings(weights=tiny_weights, max_batch=16)
    with serving(settings, fault_injection.load(fault)) as client, ThreadPoolExecutor(16) as pool:
        alone = ask(client, cat).json()
        answers = list(pool.map(lambda i: ask(client, white if i % 8 == 3 else cat, cat), range(48)))
        for i, answer in enumerate(answers):
            if i % 8 == 3:
                assert answer.status_code == 500
                assert answer.json()["type"] == "urn:thirtytwo:problem:internal"
                assert answer.json()["request_id"] == answer.headers["x-request-id"]
                assert "secret" not in answer.text
            else:
                assert answer.json()["predictions"][1] == alone["predictions"][0] | {"filename": "x.png"}
        assert client.get("/readyz").status_code == 200


def test_an_unexpected_error_leaves_the_connection_to_the_next_request(tiny_weights: Path, white: bytes) -> None:
    headers = {"Content-Type": "image/png", "Inference-Header-Content-Length": "0"}
    with serving(Settings(weights=tiny_weights, max_batch=16), fault_injection.load(fault_injection.raising)) as client:
        connection = http.client.HTTPConnection("127.0.0.1", client.base_url.port or 0, timeout=30)
        connection.connect()
        connection.auto_open = 0  # a closed connection is an error, not opened again
        for path in ("/predict", "/v2/models/tiny_image/infer") * 3:
            connection.request("POST", path, white, headers)
            answer = connection.getresponse()
            assert answer.status == 500
            assert b"secret" not in answer.read()
        connection.close()


def test_a_batch_that_does_not_fit_memory_is_halved_until_it_does(tiny_weights: Path, cat: bytes, white: bytes) -> None:
    with serving(Settings(weights=tiny_weights, max_batch=16), fault_injection.load(fault_injection.cramped)) as client:
        assert len(ask(client, white, *[cat] * 15).json()["predictions"]) == 16


@pytest.mark.slow
def test_no_answer_changes_by_a_bit_in_bad_company(tiny_weights: Path) -> None:
    pictures = [path.read_bytes() for path in sorted(EXAMPLES.glob("*.png"))]
    with serving(Settings(weights=tiny_weights, max_batch=16)) as client, ThreadPoolExecutor(8) as pool:
        alone = [ask(client, picture).json()["predictions"][0] for picture in pictures]

        def with_bad(i: int) -> bool:
            body = ask(client, b"no picture", pictures[i % len(pictures)], pictures[0][: 100 + i]).json()
            return bool(body["predictions"][1] == alone[i % len(pictures)])

        assert all(pool.map(with_bad, range(100)))


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["hanging", "dying"])
def test_a_thread_that_hangs_or_dies_is_noticed_answered_for_and_ends_the_process(
    tiny_weights: Path, cat: bytes, white: bytes, fault: str
) -> None:
    with faulty_process(fault, tiny_weights) as (running, url):
        with httpx.Client(base_url=url, timeout=20) as client, ThreadPoolExecutor(8) as pool:
            begun = time.monotonic()
            answers = list(pool.map(lambda i: ask(client, white if i == 0 else cat), range(8)))
            assert time.monotonic() - begun < 10
            assert answers[0].status_code == 503
            assert {answer.status_code for answer in answers} <= {200, 503}
        log = running.communicate(timeout=20)[1]
    assert running.returncode != 0
    assert "inference thread" in log


@pytest.mark.parametrize("alive", [routes.healthz, oip_routes.live])
def test_no_path_calls_a_failed_service_alive(alive: Callable[[State], Awaitable[object]]) -> None:
    lifecycle = Lifecycle()
    service = SimpleNamespace(lifecycle=lifecycle)
    assert asyncio.run(alive(service))
    lifecycle.phase = Phase.FAILED
    with pytest.raises(NotReady):
        asyncio.run(alive(service))
