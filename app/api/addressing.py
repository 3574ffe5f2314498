"""Which host names and which path prefix requests may have."""

from collections.abc import Sequence
from urllib.parse import quote

from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.api import problems
from app.errors import UnknownHost

PROBES = {"/healthz", "/readyz", "/metrics", "/v2/health/live", "/v2/health/ready"}  # called by IP address


class TrustedHosts:
    """Starlette's check of the Host header, with our problem document, and without it for probes."""

    def __init__(self, app: ASGIApp, names: Sequence[str]) -> None:
        self.app = app
        self._check = TrustedHostMiddleware(_accepted, names, www_redirect=False)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"].removeprefix(scope.get("root_path", "")) not in PROBES:
            refusal: list[Message] = []

            async def refuse(message: Message) -> None:
                refusal.append(message)

            await self._check(scope, receive, refuse)
            if refusal:
                error = UnknownHost("The Host header of the request names no host that is served here.")
                await problems.of_error(error, scope)(scope, receive, send)
                return
        await self.app(scope, receive, send)


async def _accepted(scope: Scope, receive: Receive, send: Send) -> None:
    """The application inside the check; that it sends nothing means that the check has passed."""


class RootPath:
    """Adds the prefix to a path from which the reverse proxy has removed it, so that both kinds of proxy work."""

    def __init__(self, app: ASGIApp, prefix: str) -> None:
        self.app = app
        self._prefix = prefix
        self._raw_prefix = quote(prefix).encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not scope.get("root_path"):
            path, raw_path = scope["path"], scope.get("raw_path", b"")
            if f"{path}/".startswith(f"{self._prefix}/"):
                scope = {**scope, "root_path": self._prefix}
            else:
                changes = {"path": self._prefix + path, "raw_path": self._raw_prefix + raw_path}
                scope = {**scope, "root_path": self._prefix, **changes}
        await self.app(scope, receive, send)
