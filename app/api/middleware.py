"""Around every request: its id, security headers, access log, metrics, and the response to unexpected errors."""

import logging
import math
import re
import time
from itertools import count
from secrets import token_hex

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.api import problems
from app.errors import QueueFull
from app.telemetry.logs import AccessLog
from app.telemetry.metrics import Metrics

SMALL_BYTES = 262_144  # of a body that is taken whatever others hold, so that slow large ones lock nobody out
LINGER_DIGITS = 6  # a declared body of up to 999,999 bytes is read to its end, so that its sender sees the answer
EVERY_ANSWER = (
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-cache"),  # asked again every time, so that no page meets another version's script
)
PORT = re.compile(r":\d*$")
SANE_ID = re.compile(rb"[A-Za-z0-9._-]{1,128}")

logger = logging.getLogger(__name__)


class RequestContext:
    """Takes a sane X-Request-ID or makes one, answers with it, logs and counts the request, renders what escaped.

    While large bodies together hold more than max_held bytes, further ones get QueueFull: else a few hundred callers
    could fill the memory, each within the limit of one body.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, access: AccessLog | None, max_held: float = math.inf) -> None:
        self.app = app
        self.metrics = metrics
        self.access = access
        self._max_held = max_held
        self._held = 0  # bytes of all bodies under way, but for those that came in one piece
        self._prefix, self._numbers = token_hex(8), count()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, _without_traceback(send))
            return
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        request_id = self._request_id(headers.get(b"x-request-id", b""))
        scope.setdefault("state", {})["request_id"] = request_id
        unread = b"transfer-encoding" in headers or len(headers.get(b"content-length", b"")) > LINGER_DIGITS
        begun, status, answered, held = time.perf_counter(), 0, False, 0

        async def receive_body() -> Message:
            nonlocal unread, held
            message = await receive()
            unread = unread and message.get("more_body", False)
            held += self._hold(message, held)
            return message

        async def send_with_id(message: Message) -> None:
            nonlocal status, answered
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] += ((b"x-request-id", request_id.encode()), *EVERY_ANSWER)
                if unread:  # refused before a large body was read: do not go on receiving it
                    message["headers"].append((b"connection", b"close"))
            await send(message)
            answered = message["type"] == "http.response.body" and not message.get("more_body", False)

        try:
            await self.app(scope, receive_body, send_with_id)
        except Exception:
            logger.exception("unexpected error", extra={"request_id": request_id})
            if status and not answered:
                raise  # the server closes the connection, since the answer will never be whole
            if not answered:
                await problems.internal(scope)(scope, receive, send_with_id)
        finally:
            self._held -= held
            self._record(scope, status, time.perf_counter() - begun, request_id)

    def _hold(self, message: Message, so_far: int) -> int:
        """The bytes that the message adds to what is held; raises QueueFull where that is too much."""
        size = len(message["body"]) if message.get("more_body", False) else 0
        if self._held + size > self._max_held and so_far + size > SMALL_BYTES:
            raise QueueFull("Too many large uploads are under way.", retry_after_s=1)
        self._held += size
        return size

    def _request_id(self, sent: bytes) -> str:
        return sent.decode() if SANE_ID.fullmatch(sent) else f"{self._prefix}{next(self._numbers):08x}"

    def _record(self, scope: Scope, status: int, seconds: float, request_id: str) -> None:
        route = getattr(scope.get("route"), "path", "unmatched")
        self.metrics.observe_request(route, status, seconds)
        if self.access:
            self.access.add(scope["method"], route, status, seconds, request_id)


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
