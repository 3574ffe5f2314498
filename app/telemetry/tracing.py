"""OpenTelemetry traces, if the extra `otel` is installed and OTEL_* variables name a collector.

The libraries' own middlewares record paths, queries and addresses of callers; these spans have the fields of the
log only.
"""

import asyncio
import time

from opentelemetry import propagate, trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app import __version__
from app.telemetry.metrics import Timings

NAME = "thirtytwo"
METHODS = {"GET", "POST", "HEAD", "OPTIONS", "PUT", "PATCH", "DELETE"}  # any other is text of the caller


class Tracing:
    """A span around every request and one for each of its steps, in the caller's trace if the request names one."""

    def __init__(self, app: ASGIApp, provider: TracerProvider) -> None:
        self.app = app
        self._provider = provider
        self._tracer = provider.get_tracer(NAME, __version__)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, self._exporting_at_shutdown(send))
            return
        method = scope["method"] if scope["method"] in METHODS else "_OTHER"
        caller = propagate.extract(
            {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        )
        status = 0

        async def send_noting_status(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        attributes = {"http.request.method": method, "url.scheme": scope["scheme"]}
        with self._tracer.start_as_current_span(
            method, caller, trace.SpanKind.SERVER, attributes, record_exception=False
        ) as span:
            try:
                await self.app(scope, receive, send_noting_status)
            finally:
                if span.is_recording():
                    self._describe(span, scope, method, status)

    def _exporting_at_shutdown(self, send: Send) -> Send:
        """Exports the last spans before the shutdown completes: the process may exit without exit handlers."""

        async def send_after_export(message: Message) -> None:
            if message["type"] == "lifespan.shutdown.complete":
                await asyncio.to_thread(self._provider.shutdown)
            await send(message)

        return send_after_export

    def _describe(self, span: trace.Span, scope: Scope, method: str, status: int) -> None:
        span.set_attribute("request_id", scope["state"]["request_id"])
        if route := getattr(scope.get("route"), "path", None):
            span.update_name(f"{method} {route}")
            span.set_attribute("http.route", route)
        if status:
            span.set_attribute("http.response.status_code", status)
        if status >= 500:
            span.set_attribute("error.type", str(status))
            span.set_status(trace.StatusCode.ERROR)
        if timings := scope["state"].get("timings"):
            self._describe_steps(timings)

    def _describe_steps(self, timings: Timings) -> None:
        """The steps follow each other without a gap."""
        begin = time.time_ns() - int((time.perf_counter() - timings.start) * 1e9)
        for name, seconds in (("decode", timings.decode_s), ("queue", timings.queue_s), ("model", timings.inference_s)):
            end = begin + int(seconds * 1e9)
            self._tracer.start_span(name, start_time=begin).end(end)
            begin = end


def exporting() -> TracerProvider:
    """A provider with exporter and sampler from the standard OTEL_* variables."""
    resource = Resource({"service.name": NAME, "service.version": __version__}).merge(OTELResourceDetector().detect())
    provider = TracerProvider(resource=resource)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return provider
