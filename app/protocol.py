"""uvicorn's HTTP protocol, with a gentler end of its connections."""

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

LINGER_S = 0.3  # a request that was sent before its sender could know of the stop arrives within this time


class Protocol(HttpToolsProtocol):
    def shutdown(self) -> None:
        """Gives an idle connection a moment before it is closed, so that no request is lost on its way."""
        if self.cycle is None or self.cycle.response_complete:
            self.loop.call_later(LINGER_S, super().shutdown)
        else:
            super().shutdown()
