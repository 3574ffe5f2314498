"""uvicorn's HTTP protocol, impatient with slow senders and endless heads, and with a gentler end of its connections."""

from asyncio import AbstractEventLoop, BaseTransport, TimerHandle, Transport
from typing import Any, ClassVar, cast

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

GRACE_S = 0.05  # in which we read what has arrived while we were too busy to
LINGER_S = 0.3  # a request that was sent before its sender could know of the stop arrives within this time
JOINED_BYTES = 65_536  # more is handed on at once, for the flow control to see


class Joining:
    """A transport that sends what is written in one turn of the event loop as one: an answer's head and its body.

    uvicorn writes them apart. Each write is a call of the kernel, a packet, and mostly a wake-up of the caller.
    """

    def __init__(self, transport: Transport, loop: AbstractEventLoop) -> None:
        self._transport = transport
        self._loop = loop
        self._parts: list[bytes] = []
        self._size = 0

    def write(self, data: bytes) -> None:
        if not self._parts:
            self._loop.call_soon(self._flush)
        self._parts.append(data)
        self._size += len(data)
        if self._size > JOINED_BYTES:
            self._flush()

    def close(self) -> None:
        self._flush()
        self._transport.close()

    def is_closing(self) -> bool:
        return self._transport.is_closing()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def _flush(self) -> None:
        if self._parts:
            self._transport.write(b"".join(self._parts))
            self._parts, self._size = [], 0


class Protocol(HttpToolsProtocol):
    patience_s: ClassVar[float] = 10.0  # how long a request may stay unfinished without progress
    least_bytes: ClassVar[int] = 5_000  # that count as progress in that time
    max_head_bytes: ClassVar[int] = 32_768  # of request line and headers

    _watch: TimerHandle | None = None
    _received = 0  # bytes since the last look
    _head_bytes = 0  # bytes since the last whole head

    def connection_made(self, transport: BaseTransport) -> None:
        super().connection_made(cast(Transport, Joining(cast(Transport, transport), self.loop)))
        self._start_watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_watch()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._received += len(data)
        self._head_bytes += len(data)
        super().data_received(data)
        if self._head_bytes > self.max_head_bytes and not self.transport.is_closing():
            self.send_400_response("The head of the request is too long.")

    def on_message_begin(self) -> None:
        self._start_watch()
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._head_bytes = 0
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._head_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._stop_watch()
        super().on_message_complete()

    def shutdown(self) -> None:
        """Gives an idle connection a moment before it is closed, so that no request is lost on its way."""
        if self.cycle is None or self.cycle.response_complete:
            self.loop.call_later(LINGER_S, super().shutdown)
        else:
            super().shutdown()

    def _start_watch(self) -> None:
        if self._watch is None:
            self._received = 0
            self._watch = self.loop.call_later(self.patience_s, self._look)

    def _stop_watch(self) -> None:
        if self._watch is not None:
            self._watch.cancel()
            self._watch = None

    def _look(self, last: bool = False) -> None:
        """Closes the connection of a request that arrives by drops, unless it is we who do not read on."""
        self._watch = None
        if self._received >= self.least_bytes or self.flow.read_paused:
            self._start_watch()
        elif last:
            self.transport.close()
        else:
            self._watch = self.loop.call_later(GRACE_S, self._look, True)
