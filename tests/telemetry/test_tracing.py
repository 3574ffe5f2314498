"""Traces: what a span tells, whose trace it is in, and that nothing is sent where no collector is named."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind

from app.application import COLLECTOR
from app.settings import Settings
from app.telemetry.tracing import Tracing
from tests.conftest import serving
from tests.support import fault_injection
from tests.support.subprocesses import command, free_port, wait_until_ready

RAW = {"Inference-Header-Content-Length": "0"}
WHITE = [[[255] * 3] * 32] * 32
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"

Take = Callable[[int], list[ReadableSpan]]


@pytest.fixture(scope="module")
def traced(tiny_weights: Path) -> Iterator[tuple[httpx.Client, Take]]:
    """The service, and the next so many spans that it ends."""
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))

    def take(count: int) -> list[ReadableSpan]:
        deadline = time.monotonic() + 30
        while len(exporter.get_finished_spans()) < count:  # a span ends after its answer
            assert time.monotonic() < deadline, exporter.get_finished_spans()
            time.sleep(0.01)
        spans = list(exporter.get_finished_spans())
        assert len(spans) == count
        exporter.clear()
        return spans

    settings = Settings(weights=tiny_weights, max_batch=16)
    with serving(
        settings, fault_injection.load(fault_injection.raising), around=lambda app: Tracing(app, provider)
    ) as client:
        yield client, take


@pytest.mark.parametrize(
    ("path", "route"),
    [("/predict?top_k=2", "/predict"), ("/v2/models/tiny_image/infer", "/v2/models/{name}/infer")],
)
def test_a_prediction_has_a_span_with_its_steps(
    traced: tuple[httpx.Client, Take], cat: bytes, path: str, route: str
) -> None:
    client, take = traced
    begun = time.time_ns()
    headers = {"content-type": "image/png", "x-request-id": "mine", "user-agent": "private", **RAW}
    client.post(path, content=cat, headers=headers)
    *steps, server = take(4)
    assert server.name == f"POST {route}"
    assert server.kind is SpanKind.SERVER
    assert server.parent is None
    assert dict(server.attributes) == {
        "http.request.method": "POST",
        "url.scheme": "http",
        "http.route": route,
        "http.response.status_code": 200,
        "request_id": "mine",
    }
    assert server.status.is_unset
    assert [step.name for step in steps] == ["decode", "queue", "model"]
    assert {step.parent.span_id for step in steps} == {server.context.span_id}
    moments = [moment for step in steps for moment in (step.start_time, step.end_time)]
    assert moments == sorted(moments)
    assert begun <= server.start_time <= moments[0] < moments[-1] <= server.end_time


def test_a_span_tells_nothing_of_the_files(traced: tuple[httpx.Client, Take], cat: bytes) -> None:
    client, take = traced
    client.post("/predict", files=[("file", ("private.png", cat)), ("file", ("private.txt", b"private"))])
    client.get("/private?private=private")
    assert "private" not in json.dumps([span.to_json() for span in take(5)])


@pytest.mark.parametrize("sampled", [True, False])
def test_the_callers_trace_goes_on_if_it_is_sampled(traced: tuple[httpx.Client, Take], sampled: bool) -> None:
    client, take = traced
    client.get("/healthz", headers={"traceparent": f"00-{TRACE}-{PARENT}-{sampled:02x}"})
    client.get("/readyz", headers={"traceparent": f"00-{TRACE}-{PARENT}-01"})
    last = take(1 + sampled)[-1]
    assert last.name == "GET /readyz"
    assert f"{last.context.trace_id:x}" == TRACE.lstrip("0")
    assert f"{last.parent.span_id:x}" == PARENT


@pytest.mark.parametrize(("path", "name", "status"), [("/predict", "POST /predict", 415), ("/none", "POST", 404)])
def test_a_refusal_is_no_error_of_the_service(
    traced: tuple[httpx.Client, Take], path: str, name: str, status: int
) -> None:
    client, take = traced
    client.post(path, content=b"x", headers={"content-type": "text/plain"})
    (span,) = take(1)
    assert (span.name, span.attributes["http.response.status_code"]) == (name, status)
    assert span.status.is_unset


def test_an_error_of_the_service_is_one(traced: tuple[httpx.Client, Take]) -> None:
    client, take = traced
    inputs = [{"name": "image", "datatype": "UINT8", "shape": [1, 32, 32, 3], "data": [WHITE]}]
    assert client.post("/v2/models/tiny/infer", json={"inputs": inputs}).status_code == 500
    (span,) = take(1)
    assert span.attributes["error.type"] == "500"
    assert not span.status.is_ok
    assert not span.status.is_unset
    assert "secret" not in span.to_json()


@pytest.mark.slow
def test_spans_reach_the_collector_that_the_environment_names(tiny_weights: Path, cat: bytes) -> None:
    received: list[tuple[str, bytes]] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received.append((self.path, self.rfile.read(int(self.headers["content-length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Collector) as server:
        threading.Thread(target=server.serve_forever).start()
        port = free_port()
        variables = {
            "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
            "OTEL_SERVICE_NAME": "mine",
        }
        running = subprocess.Popen(
            command("--weights", str(tiny_weights), "--port", str(port)),
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **variables},
        )
        try:
            wait_until_ready(running, f"http://127.0.0.1:{port}")
            httpx.post(f"http://127.0.0.1:{port}/predict", content=cat, headers={"content-type": "image/png"})
            running.send_signal(signal.SIGTERM)
            assert running.wait(30) == 0
        finally:
            running.kill()
            running.communicate()
            server.shutdown()
    assert {path for path, _ in received} == {"/v1/traces"}
    sent = [group for _, body in received for group in ExportTraceServiceRequest.FromString(body).resource_spans]
    services = {
        item.value.string_value for group in sent for item in group.resource.attributes if item.key == "service.name"
    }
    assert services == {"mine"}
    names = {span.name for group in sent for scope in group.scope_spans for span in scope.spans}
    assert {"GET /readyz", "POST /predict", "decode", "queue", "model"} == names


@pytest.mark.slow
@pytest.mark.parametrize(
    ("installed", "variables", "expected"),
    [
        (True, {}, "RequestContext False"),
        (True, {COLLECTOR[0]: "http://127.0.0.1:1", "OTEL_TRACES_EXPORTER": "none"}, "RequestContext False"),
        (True, {COLLECTOR[1]: "http://127.0.0.1:1"}, "Tracing True"),
        (False, {COLLECTOR[0]: "http://127.0.0.1:1"}, "RequestContext False"),
    ],
)
def test_it_costs_nothing_where_it_is_off(installed: bool, variables: dict[str, str], expected: str) -> None:
    program = f"""
import sys
if not {installed}:
    sys.modules["opentelemetry.exporter"] = None
from app.application import create_app
print(type(create_app()).__name__, "opentelemetry.sdk.trace" in sys.modules)
"""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OTEL_")}
    done = subprocess.run(
        [sys.executable, "-c", program], env={**environment, **variables}, capture_output=True, text=True, check=True
    )
    assert done.stdout == f"{expected}\n"
    assert ("extra 'otel' is not installed" in done.stderr) is not installed
