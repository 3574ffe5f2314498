"""Around every request: its id, security headers, access log, metrics, and the response to unexpected errors."""

import asyncio
import logging
import math
import re
import sys
import time
from itertools import count
from secrets import token_hex

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.api import problems
from app.errors import ClientDisconnected, NotReady, RequestError, ThirtytwoError
from app.http.connections import Connections, Headers
from app.telemetry.logs import AccessLog
from app.telemetry.metrics import Metrics

DISCARDED_DIGITS = 6  # the rest of a body of up to 999,999 bytes is discarded; a larger one closes the connection
SECURITY_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-cache"),  # revalidated each time: pages and scripts must be of one version
)
VALID_REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,128}")

logger = logging.getLogger(__name__)


class RequestContext:
    """Adds X-Request-ID (the caller's, if valid) and security headers, logs and counts, answers unexpected errors.

    HEAD is served as GET without the body. A request whose caller leaves before the response counts as 499.

    The protocol hands over an error of a request that is already here as `receive_error` in the scope's state; the next
    `receive` raises it. It gets the connections' shared state through the state of the lifespan.
    """

    def __init__(
        self, app: ASGIApp, metrics: Metrics, access: AccessLog | None, max_inflight_bytes: float = math.inf
    ) -> None:
        self.app = app
        self.metrics = metrics
        self.access = access
        self._connections = Connections(self._render_error, max_inflight_bytes)
        self._prefix, self._numbers = token_hex(8), count()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await _Exchange(self, scope, receive, send).run()
        elif scope["type"] == "lifespan":
            scope.setdefault("state", {})["connections"] = self._connections
            await self.app(scope, receive, _without_traceback(send))
        else:
            await self.app(scope, receive, send)

    def request_id(self, sent: bytes = b"") -> str:
        return sent.decode() if VALID_REQUEST_ID.fullmatch(sent) else f"{self._prefix}{next(self._numbers):08x}"

    def record(self, method: str, route: str, status: int, seconds: float, request_id: str) -> None:
        self.metrics.observe_request(route, status, seconds)
        if self.access:
            self.access.add(method, route, status, seconds, request_id)

    def _render_error(self, error: RequestError, scope: Scope | None) -> tuple[Headers, bytes]:
        if scope is None:
            scope = {"path": "", "state": {"request_id": self.request_id()}}
            self.record("-", "unmatched", error.status, 0.0, scope["state"]["request_id"])
        response = problems.of_error(error, scope)
        headers = [(name, value) for name, value in response.raw_headers if name != b"connection"]
        request_id = scope["state"]["request_id"].encode()
        return [*headers, (b"x-request-id", request_id), *SECURITY_HEADERS], bytes(response.body)


class _Exchange:
    """One request and its response."""

    def __init__(self, context: RequestContext, scope: Scope, receive: Receive, send: Send) -> None:
        headers = dict(scope["headers"])
        self._context = context
        self._receive, self._send = receive, send
        self._start = time.perf_counter()
        self._request_id = context.request_id(headers.get(b"x-request-id", b""))
        self._state = scope.setdefault("state", {})
        self._state["request_id"] = self._request_id
        self._method = scope["method"]
        if b"range" in headers:  # which a server may ignore: hundreds of ranges cost 10 ms, and no file here is large
            scope["headers"] = [header for header in scope["headers"] if header[0] != b"range"]
        self._outer_scope = scope
        self._scope = {**scope, "method": "GET"} if self._method == "HEAD" else scope
        self._body_pending = (
            b"transfer-encoding" in headers
            or len(headers.get(b"content-length", b"")) > DISCARDED_DIGITS
            or b"expect" in headers  # the body may or may not follow a response other than 100
        )
        self._status = 0
        self._answered = self._disconnected = False

    async def run(self) -> None:
        try:
            await self._context.app(self._scope, self.receive, self.send)
        except ClientDisconnected:
            self._disconnected = True
        except asyncio.CancelledError:  # by the server, of what outlasts its shutdown
            await self._answer(NotReady("The service is shutting down.", retry_after_s=1))
        except RequestError as error:
            await self._answer(error)
        except Exception:
            logger.exception("unexpected error", extra={"request_id": self._request_id})
            if self._status and not self._answered:
                raise  # the server closes the connection, since the response stays incomplete
            if not self._answered:
                await problems.internal(self._scope)(self._scope, self.receive, self.send)
        finally:
            self._outer_scope["route"] = route = self._scope.get("route")
            seconds = time.perf_counter() - self._start
            path = getattr(route, "path", "unmatched")
            self._context.record(self._method, path, self._final_status(), seconds, self._request_id)

    async def receive(self) -> Message:
        message = await self._receive()
        if "receive_error" in self._state:
            raise self._state["receive_error"]
        if message["type"] == "http.disconnect":
            self._disconnected = True
        elif not message.get("more_body", False):
            self._body_pending = False
        return message

    async def send(self, message: Message) -> None:
        if message.get("status") == ClientDisconnected.status:
            self._disconnected = True
        if self._disconnected and not self._status:
            return
        if message["type"] == "http.response.start":
            self._status = message["status"]
            message["headers"] += ((b"x-request-id", self._request_id.encode()), *SECURITY_HEADERS)
            if limit := self._state.get("rate_limit"):
                message["headers"] += limit
            if self._body_pending:
                message["headers"].append((b"connection", b"close"))
        elif self._method == "HEAD":
            message["body"] = b""
        await self._send(message)
        self._answered = message["type"] == "http.response.body" and not message.get("more_body", False)

    def _final_status(self) -> int:
        """The response's, or what stands for none."""
        if self._status:
            return self._status
        aborted_by = self._state.get("aborted_by")
        return aborted_by.status if aborted_by else ClientDisconnected.status

    async def _answer(self, error: RequestError) -> None:
        if not self._status:
            await problems.of_error(error, self._scope)(self._scope, self.receive, self.send)


def _without_traceback(send: Send) -> Send:
    """Reports a known start-up error in one line."""

    async def send_brief(message: Message) -> None:
        if message["type"] == "lifespan.startup.failed":
            error = sys.exception()  # Starlette sends this while it handles the error
            if isinstance(error, ThirtytwoError):
                message = {**message, "message": " ".join(str(error).splitlines())}
        await send(message)

    return send_brief
