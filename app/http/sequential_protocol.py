"""uvicorn's HTTP/1.1 protocol, but it parses the next request only after the response to the one before."""

import time
from asyncio import BaseTransport, Transport
from enum import Enum, auto
from typing import Any, ClassVar, cast

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from app.errors import HeadTooLarge, MalformedRequest, RequestError, UrlTooLong
from app.http.connections import Connections, render_text
from app.http.framing import Framing, Headers, check_head, without_upgrade
from app.http.transport import CoalescingTransport

MAX_BUFFERED_BYTES = 65_536  # of pipelined requests, before reading pauses
PARSE_BUDGET_S = 0.0005  # of one iteration of the event loop
FREE_OVERHEAD_BYTES = 65_536  # of a chunked body; further chunk headers, extensions and trailers need as much data
COPIED_BYTES = 4_096  # of a piece for the parser; a view of a larger one is cheaper
ParserError = httptools.HttpParserError


class Phase(Enum):
    """Of the request that is parsed, not of the one that is answered."""

    IDLE = auto()
    HEAD = auto()
    BODY = auto()


IDLE, HEAD, BODY = Phase


class SequentialProtocol(HttpToolsProtocol):
    """Bounds the work of one iteration of the event loop, and answers what precedes an invalid request.

    An invalid request gets a problem document. If the application has the request already, it raises that error on its
    next `receive` instead: see `receive_error` in app.api.middleware.
    """

    max_head_bytes: ClassVar[int] = 32_768  # of request line and headers
    max_url_bytes: ClassVar[int] = 2_048
    max_headers: ClassVar[int] = 100
    max_header_bytes: ClassVar[int] = 8_192  # of one header

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._shared: Connections = self.app_state.get("connections") or Connections(render_text)
        self._framing = Framing()
        self._phase = IDLE
        self._buffer = b""
        self._position = 0  # in the buffer, of the next byte to parse
        self._request_bytes = 0  # parsed, of the request that is not answered
        self._resuming = False
        self._overhead = 0  # bytes of the chunked body that are no data
        self._error: RequestError | None = None  # ended the parsing
        self._closes_after_response = False

    def connection_made(self, transport: BaseTransport) -> None:
        self._wire = CoalescingTransport(cast(Transport, transport), self.loop)
        super().connection_made(cast(Transport, self._wire))

    def connection_lost(self, exc: Exception | None) -> None:
        self._buffer, self._position, self._request_bytes = b"", 0, 0
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._error is not None or self._wire.is_closing():
            self._wire.discard(len(data))
            return
        self._buffer = self._buffer[self._position :] + data if self._buffer else data
        self._position = 0
        if not self._resuming:
            self._parse()

    @property
    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _parse(self) -> None:
        """Parses the buffer up to the end of a request, for PARSE_BUDGET_S at most."""
        stop = 0.0
        while self._position < len(self._buffer) and not self._is_blocked():
            if stop and time.monotonic() > stop:
                self._resume_soon()
                break
            self._parse_piece()
            stop = stop or time.monotonic() + PARSE_BUDGET_S
        left = len(self._buffer) - self._position
        if not left:
            self._buffer, self._position = b"", 0
        self._wire.expects_data = left > 0 or self._phase is not IDLE
        self._wire.hold_reading(left > MAX_BUFFERED_BYTES)

    def _resume_soon(self) -> None:
        self._resuming = True
        self.loop.call_soon(self._resume)

    def _resume(self) -> None:
        self._resuming = False
        if not self._wire.is_closing():
            self._parse()

    def _is_blocked(self) -> bool:
        return self._error is not None or (self._phase is IDLE and self._is_answering)

    def _parse_piece(self) -> None:
        start = self._position
        end = self._position = self._framing.end_of_piece(self._buffer, start)
        if self._framing.head_bytes > self.max_head_bytes:
            self._reject(HeadTooLarge(f"The head of the request has over {self.max_head_bytes} bytes."))
            return
        is_large = end - start > COPIED_BYTES
        try:
            self.parser.feed_data(memoryview(self._buffer)[start:end] if is_large else self._buffer[start:end])
        except httptools.HttpParserUpgrade as upgrade:
            self._position = start + cast(int, upgrade.args[0])
            self._parse_without_upgrade()
        except ParserError as error:
            self._reject_unparsed(error)
        if self._phase is not HEAD and not self._is_answering:
            self._request_bytes = 0  # line ends before a request, or a body whose request is answered
            return
        self._request_bytes += end - start
        if self._framing.chunked:
            self._overhead += end - start
            if self._overhead > FREE_OVERHEAD_BYTES + self._request_bytes // 2:
                self._reject(MalformedRequest("The chunked body has more chunk headers than data."))

    def _parse_without_upgrade(self) -> None:
        """Parses the head again without its request for another protocol, which RFC 9110, section 7.8, lets us ignore.

        The parser leaves what follows such a head to the other protocol: the body would be lost, or be parsed as the
        next request.
        """
        method, version = self.parser.get_method(), self.parser.get_http_version().encode()
        if method == b"CONNECT":
            self._reject(MalformedRequest("The service is not a proxy."))
            return
        lines = [method + b" " + self.url + b" HTTP/" + version]
        lines += [name + b": " + value for name, value in without_upgrade(self.headers)]
        self.parser = httptools.HttpRequestParser(self)
        try:
            self.parser.feed_data(b"\r\n".join(lines) + b"\r\n\r\n")
        except ParserError as error:
            self._reject_unparsed(error)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._phase = HEAD
        self._overhead = 0

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        if len(self.url) > self.max_url_bytes:
            raise UrlTooLong(f"The URL has over {self.max_url_bytes} bytes.")

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._phase is BODY:
            return  # a trailer
        if len(self.headers) == self.max_headers:
            raise HeadTooLarge(f"The request has over {self.max_headers} headers.")
        name, value = name.lower(), value.rstrip(b" \t")  # RFC 9112, section 5.1; the parser leaves them
        self.headers.append((name, value))
        if name == b"content-length":
            self._framing.body_left = int(value)
        elif name == b"transfer-encoding":
            self._framing.chunked = True
        elif name == b"expect":
            self.expect_100_continue = value.lower() == b"100-continue"

    def on_headers_complete(self) -> None:
        if self.parser.should_upgrade():
            return
        if self._framing.head_bytes > self.max_header_bytes:
            self._check_header_sizes()
        version = self.parser.get_http_version()
        check_head(version, self.headers)
        if version == "1.0":
            self.expect_100_continue = False  # RFC 9110, section 10.1.1
        super().on_headers_complete()
        if self._closes_after_response:
            self.cycle.keep_alive = False
        self._phase = BODY

    def _check_header_sizes(self) -> None:
        if any(len(name) + len(value) > self.max_header_bytes for name, value in self.headers):
            raise HeadTooLarge(f"A header has over {self.max_header_bytes} bytes.")

    def on_body(self, body: bytes) -> None:
        if self._framing.chunked:
            self._overhead -= len(body)
        else:
            self._framing.body_left -= len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        if self.parser.should_upgrade():
            return
        super().on_message_complete()
        self._framing.expect_head()
        self._phase = IDLE

    def _should_upgrade(self) -> bool:
        return False

    def on_response_complete(self) -> None:
        """Replaces uvicorn's, which starts a timer for each response: `Connections` closes idle connections."""
        self.server_state.total_requests += 1
        self._request_bytes = 0
        if self._wire.is_closing():
            return
        self._wire.flush()  # before metrics and the access log, which a lone client would wait for
        self.flow.resume_reading()
        if self.pipeline:  # of requests that share a piece of a chunked body
            self._start_asgi_task(*self.pipeline.pop())
        elif self._error is not None:
            self._send_error(self._error)
        elif self._buffer:
            self._resume_soon()

    def _reject_unparsed(self, error: ParserError) -> None:
        cause = error.__context__
        self._reject(cause if isinstance(cause, RequestError) else MalformedRequest("The request is not HTTP/1.1."))

    def _reject(self, error: RequestError) -> None:
        """Ends the parsing. The error is the response to the request that is parsed, after those to earlier ones."""
        if self._error is not None:
            return
        self._error = error
        self._buffer, self._position = b"", 0
        if not self._is_answering:
            self._send_error(error)
        elif self._phase is not HEAD:
            self.cycle.keep_alive = False
            self.cycle.scope["state"]["receive_error"] = error
            self.cycle.message_event.set()

    def _send_error(self, error: RequestError) -> None:
        if self._phase is not BODY:  # else the response to this request is sent
            self._write_response(error.status, *self._shared.render_error(error, None))
        self._close_lingering()

    def _write_response(self, status: int, headers: Headers, body: bytes) -> None:
        headers = [*self.server_state.default_headers, *headers, (b"connection", b"close")]
        lines = [name + b": " + value for name, value in headers]
        self._wire.write(STATUS_LINE[status] + b"\r\n".join(lines) + b"\r\n\r\n" + body)

    def _close_lingering(self) -> None:
        self._wire.expects_data = True
        self._wire.close()
