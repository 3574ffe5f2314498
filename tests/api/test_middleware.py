"""HEAD, request ids, CORS headers, and requests that end without a response."""

import asyncio
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image
from starlette.types import Message, Receive, Scope, Send

from app.api.middleware import RequestContext
from app.errors import ClientDisconnected, TooLarge
from app.settings import Settings
from app.telemetry.metrics import Metrics
from tests.conftest import serving
from tests.support import fault_injection

GET_PATHS = [
    "/",
    "/docs",
    "/openapi.json",
    "/model",
    "/healthz",
    "/readyz",
    "/static/swagger/swagger-ui-bundle.js",
    "/v2",
    "/v2/health/live",
    "/v2/health/ready",
    "/v2/models/tiny",
    "/v2/models/tiny/config",
    "/v2/models/tiny/ready",
    "/v2/models/nothing",
    "/nothing",
]
VOLATILE = {"date", "x-request-id", "content-length"}


@pytest.mark.parametrize("path", GET_PATHS)
def test_head_answers_as_get_without_a_body(client: httpx.Client, path: str) -> None:
    got, head = client.get(path), client.head(path)
    assert (head.status_code, head.content) == (got.status_code, b"")
    assert set(head.headers) == set(got.headers)
    assert {k: v for k, v in head.headers.items() if k not in VOLATILE} == {
        k: v for k, v in got.headers.items() if k not in VOLATILE
    }
    if got.status_code == 200:
        assert head.headers["content-length"] == str(len(got.content))


def test_head_of_the_metrics_has_a_length(client: httpx.Client) -> None:
    response = client.head("/metrics")
    assert response.status_code == 200
    assert int(response.headers["content-length"]) > 1000


def test_head_is_counted_by_its_route(client: httpx.Client) -> None:
    client.head("/v2/models/tiny/ready")
    assert 'route="/v2/models/{name}/ready",status="200"' in client.get("/metrics").text


def test_head_of_a_post_route_is_not_allowed(client: httpx.Client) -> None:
    response = client.head("/predict")
    assert (response.status_code, response.headers["allow"], response.content) == (405, "POST", b"")


def test_the_schema_has_no_head(client: httpx.Client) -> None:
    methods = {method for path in client.get("/openapi.json").json()["paths"].values() for method in path}
    assert methods == {"get", "post"}


@pytest.fixture(scope="module")
def cross_origin(tiny_weights: Path) -> Iterator[httpx.Client]:
    """A service for https://a.org whose engine fails on white images."""
    settings = Settings(weights=tiny_weights, max_batch=1, cors_origins="https://a.org", max_file_bytes=1_000_000)
    with serving(settings, fault_injection.load(fault_injection.raising)) as client:
        client.headers["origin"] = "https://a.org"
        yield client


@pytest.mark.slow
@pytest.mark.parametrize(
    ("send", "status"),
    [
        (lambda client: client.get("/healthz"), 200),
        (lambda client: client.head("/healthz"), 200),
        (lambda client: client.get("/nothing"), 404),
        (lambda client: client.post("/predict", content=bytes(2_000_000), headers={"content-type": "image/png"}), 413),
        (lambda client: client.post("/predict", content=b"x", headers={"content-type": "text/plain"}), 415),
    ],
)
def test_every_response_has_cors_headers(
    cross_origin: httpx.Client, send: Callable[[httpx.Client], httpx.Response], status: int
) -> None:
    assert_cors(send(cross_origin), status)


@pytest.mark.parametrize("path", ["/predict", "/v2/models/tiny_image/infer"])
def test_an_internal_error_has_cors_headers(cross_origin: httpx.Client, path: str) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32), "white").save(buffer, "PNG")
    headers = {"content-type": "image/png", "inference-header-content-length": "0"}
    assert_cors(cross_origin.post(path, content=buffer.getvalue(), headers=headers), 500)


def assert_cors(response: httpx.Response, status: int) -> None:
    assert response.status_code == status
    assert response.headers["access-control-allow-origin"] == "https://a.org"
    exposed = response.headers["access-control-expose-headers"].split(", ")
    assert set(exposed) == {"RateLimit", "RateLimit-Policy", "Retry-After", "Server-Timing", "X-Request-ID"}


def test_a_preflight_allows_head(cross_origin: httpx.Client) -> None:
    headers = {"access-control-request-method": "HEAD"}
    response = cross_origin.options("/healthz", headers=headers)
    assert response.status_code == 200
    assert "HEAD" in response.headers["access-control-allow-methods"]


# Requests that end without a response of the application


async def disconnected() -> Message:
    return {"type": "http.disconnect"}


def run(app: Any, receive: Receive = disconnected, state: dict[str, Any] | None = None) -> tuple[list[Message], str]:
    """What is sent, and the status that is counted."""
    sent: list[Message] = []
    metrics = Metrics()

    async def send(message: Message) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/predict", "headers": [], "state": state or {}}
    asyncio.run(RequestContext(app, metrics, None)(scope, receive, send))
    (sample,) = [
        sample
        for metric in metrics.registry.collect()
        for sample in metric.samples
        if sample.name == "thirtytwo_requests_total"
    ]
    return sent, sample.labels["status"]


async def read_and_respond(scope: Scope, receive: Receive, send: Send) -> None:
    await receive()
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b""})


async def raise_disconnected(scope: Scope, receive: Receive, send: Send) -> None:
    raise ClientDisconnected("left")


async def send_499(scope: Scope, receive: Receive, send: Send) -> None:
    await send({"type": "http.response.start", "status": 499, "headers": []})
    await send({"type": "http.response.body", "body": b""})


async def cancel_itself(scope: Scope, receive: Receive, send: Send) -> None:
    await receive()
    raise asyncio.CancelledError


@pytest.mark.parametrize("app", [read_and_respond, raise_disconnected, send_499, cancel_itself])
def test_nothing_is_sent_to_a_client_that_has_left(app: Any) -> None:
    assert run(app) == ([], "499")


async def wait_for_nothing(scope: Scope, receive: Receive, send: Send) -> None:
    raise asyncio.CancelledError


def test_a_cancellation_by_the_server_is_a_503() -> None:
    sent, status = run(wait_for_nothing)
    assert (sent[0]["status"], status) == (503, "503")


def test_an_error_of_the_connection_is_raised_by_receive() -> None:
    async def received() -> Message:
        return {"type": "http.request", "body": b"", "more_body": True}

    sent, status = run(read_and_respond, received, {"receive_error": TooLarge("too large")})
    assert (sent[0]["status"], status) == (413, "413")
