"""The HTTP protocol of the service: bounds on how long a connection may wait, and on what all of them hold."""

import socket
from asyncio import BaseTransport
from collections.abc import Callable
from typing import Any, ClassVar, cast

from starlette.types import Scope
from uvicorn.protocols.utils import is_ssl

from app.errors import NotReady, QueueFull, RequestTimeout
from app.http.sequential_protocol import BODY, IDLE, SequentialProtocol

IDLE_CLOSE_DELAY_S = 0.3  # a request that was sent before its sender saw the shutdown arrives within this time
SHUTDOWN_S = 2.0  # for open connections, if the server has no timeout
LINGER_AT_SHUTDOWN_S = 1.0
REJECT_S = 0.3  # before the end of that time: connections get a 503 instead of their response
ABORT_S = 0.1  # before its end
PROBE_S = 0.1  # until the first probe of a half-closed connection; each further one waits twice as long
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


class Protocol(SequentialProtocol):
    """Read, write and keep-alive timeouts, half-closed connections, the bytes in flight, and the shutdown.

    The keep-alive timeout is uvicorn's `timeout_keep_alive`.
    """

    read_timeout_s: ClassVar[float] = 10.0  # for min_progress_bytes of a request, or for its rest
    write_timeout_s: ClassVar[float] = 10.0  # for min_progress_bytes of a response, or for its rest
    min_progress_bytes: ClassVar[int] = 5_000

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._inflight = 0  # what this connection adds to the bytes in flight
        self._answered = self._expired = False
        self._idle_since = self._window_start = 0.0
        self._received = 0  # bytes since the start of the window
        self._unsent = 0  # bytes of the response at the start of the window

    def connection_made(self, transport: BaseTransport) -> None:
        super().connection_made(transport)
        self._idle_since = self._window_start = self.loop.time()
        self._shared.add(self, self.loop, min(self.read_timeout_s, self.write_timeout_s))

    def connection_lost(self, exc: Exception | None) -> None:
        self._shared.discard(self)
        super().connection_lost(exc)
        self._account()

    def data_received(self, data: bytes) -> None:
        if self._phase is IDLE:
            self._window_start, self._received = self.loop.time(), 0
        self._received += len(data)
        super().data_received(data)

    def _parse(self) -> None:
        position, size = self._position, len(self._buffer)
        super()._parse()
        self._account()
        has_parsed = self._position != position or len(self._buffer) != size
        if has_parsed and self._request_bytes and self._shared.inflight.exceeds(self._inflight):
            self._reject(QueueFull("Too many uploads are in progress.", retry_after_s=1))
            self._request_bytes = 0  # the application drops them; others must not be refused until it does
            self._account()
        if self._wire.received_eof and not self._buffer and not self._is_answering:
            self._wire.close()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._answered = True
        self._expired = False
        self._idle_since = self.loop.time()
        self._account()
        if self._wire.received_eof and not self._buffer and not self._is_answering:
            self._wire.close()

    # Half-closed connections

    def eof_received(self) -> bool:  # type: ignore[override]  # asyncio's may return True; uvicorn's is typed as None
        """Keeps the connection for responses that are due, except with TLS, which has no half-closed connections."""
        self._wire.flush()
        is_due = self._is_answering or bool(self._buffer)
        if not is_due or self._phase is BODY or self._wire.is_closing() or is_ssl(self.transport):
            return False
        self._wire.received_eof = True
        self.loop.call_later(PROBE_S, self._probe, PROBE_S)
        return True

    def _probe(self, delay_s: float) -> None:
        """Detects a client that has left, not only closed its sending side: its system resets on the next data."""
        if self._wire.is_closing():
            return
        connection: socket.socket = self._wire.get_extra_info("socket")
        if connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            self._wire.abort()
            return
        if self._is_answering and not self.cycle.response_started and self.cycle.scope["http_version"] == "1.1":
            self._wire.write(CONTINUE)
        self.loop.call_later(2 * delay_s, self._probe, 2 * delay_s)

    # Bytes in flight

    def _account(self) -> None:
        held = self._request_bytes + len(self._buffer) - self._position
        if self.flow.write_paused:
            held += self._wire.get_write_buffer_size()
        if held != self._inflight:
            self._shared.inflight.add(held - self._inflight)
            self._inflight = held

    def pause_writing(self) -> None:
        super().pause_writing()
        self._unsent = self._wire.get_write_buffer_size()
        self._start_window()
        self._account()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._start_window()
        self._account()

    # Timeouts

    def check_timeouts(self, now: float) -> None:
        """Called about once a second."""
        if self._wire.is_closing():
            if self._wire.is_overdue(now):
                self._wire.abort()
        elif self.flow.write_paused:
            self._check_write_progress(now)
        elif self._phase is not IDLE:
            self._check_read_progress(now)
        elif not self._is_answering:
            limit_s = self.timeout_keep_alive if self._answered else self.read_timeout_s
            self._expire_after(limit_s, now - self._idle_since, self._wire.close)

    def _check_read_progress(self, now: float) -> None:
        if self._received >= self.min_progress_bytes or not self._wire.is_reading():
            self._start_window()
        else:
            self._expire_after(self.read_timeout_s, now - self._window_start, self._reject_slow)

    def _reject_slow(self) -> None:
        if self._error is not None:
            self._wire.abort()
            return
        self._start_window()
        self._reject(RequestTimeout(f"Under {self.min_progress_bytes} bytes arrived in {self.read_timeout_s:g} s."))

    def _check_write_progress(self, now: float) -> None:
        unsent = self._wire.get_write_buffer_size()
        if self._unsent - unsent >= self.min_progress_bytes:
            self._start_window()
            self._unsent = unsent
        else:
            self._expire_after(self.write_timeout_s, now - self._window_start, self._wire.abort)

    def _start_window(self) -> None:
        self._window_start = self.loop.time()
        self._received = 0
        self._expired = False

    def _expire_after(self, limit_s: float, waited_s: float, close: Callable[[], None]) -> None:
        """Acts at the second check, since data may have arrived while the event loop was busy."""
        if waited_s <= limit_s:
            return
        if self._expired:
            close()
        self._expired = True

    # Shutdown

    def shutdown(self) -> None:
        """Called after the drain. The connection ends before uvicorn's `timeout_graceful_shutdown`."""
        timeout_s = self.config.timeout_graceful_shutdown or SHUTDOWN_S
        self._closes_after_response = True
        if self._is_answering:
            self.cycle.keep_alive = False
        self.loop.call_later(IDLE_CLOSE_DELAY_S, self._close_idle)
        self.loop.call_later(min(LINGER_AT_SHUTDOWN_S, timeout_s - ABORT_S), self._abort_closed)
        self.loop.call_later(timeout_s - REJECT_S, self._reject_at_shutdown)
        self.loop.call_later(timeout_s - ABORT_S, self._wire.abort)

    def _close_idle(self) -> None:
        if not self._is_answering and not self._buffer:
            self._wire.close()

    def _abort_closed(self) -> None:
        if self._wire.is_closing():
            self._wire.abort()

    def _reject_at_shutdown(self) -> None:
        if self._wire.is_closing():
            return
        if self._is_answering and not self.cycle.response_started:
            error = NotReady("The service is shutting down.", retry_after_s=1)
            self.cycle.disconnected = True
            self.cycle.scope["state"]["aborted_by"] = error
            self.cycle.message_event.set()
            self._write_response(error.status, *self._shared.render_error(error, cast(Scope, self.cycle.scope)))
        self._close_lingering()
