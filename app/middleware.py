"""Around every request: its id, the security headers, its line in the log, its metrics, the last net for errors."""

import logging
import re
import time
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app import problems
from app.metrics import Metrics

EVERY_ANSWER = (
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-cache"),  # asked again every time, so that no page meets another version's script
)
SANE_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")

logger = logging.getLogger("app.access")


class RequestContext:
    """Takes a sane X-Request-ID or makes one, answers with it, logs and counts the request, renders what escaped."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app = app
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, _without_traceback(send))
            return
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        sent = headers.get("x-request-id", "")
        request_id = sent if SANE_ID.fullmatch(sent) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        unread = "transfer-encoding" in headers or headers.get("content-length", "0") != "0"
        begun, status = time.perf_counter(), 0

        async def receive_body() -> Message:
            nonlocal unread
            message = await receive()
            unread = bool(message.get("more_body", False))
            return message

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                answer = MutableHeaders(scope=message)
                answer["X-Request-ID"] = request_id
                answer.raw.extend(EVERY_ANSWER)
                if unread:  # refused before the body was read: do not go on receiving it
                    answer["Connection"] = "close"
            await send(message)

        try:
            await self.app(scope, receive_body, send_with_id)
        except Exception:
            logger.exception("unexpected error", extra={"request_id": request_id})
            if status:
                raise
            await problems.internal(request_id)(scope, receive, send_with_id)
        finally:
            self._record(scope, status, time.perf_counter() - begun, request_id)

    def _record(self, scope: Scope, status: int, seconds: float, request_id: str) -> None:
        route = getattr(scope.get("route"), "path", "unmatched")
        self.metrics.requests.labels(route, status).inc()
        self.metrics.latency.labels(route).observe(seconds)
        if logger.isEnabledFor(logging.INFO):
            fields = {"request_id": request_id, "route": route, "status": status, "ms": round(seconds * 1e3, 1)}
            logger.info("%s %s %d", scope["method"], route, status, extra=fields)


def _without_traceback(send: Send) -> Send:
    """A start-up that fails for a known reason says so in one line."""

    async def send_brief(message: Message) -> None:
        if message["type"] == "lifespan.startup.failed":
            last = message["message"].rstrip().rpartition("\n")[2]
            kind, _, text = last.partition(": ")
            if kind.startswith("app.errors."):
                message = {**message, "message": text}
        await send(message)

    return send_brief
