"""A transport that coalesces writes, has two reasons to pause reading, and closes without losing the last response."""

from asyncio import AbstractEventLoop, Transport
from typing import Any

MAX_COALESCED_BYTES = 65_536  # more is passed on at once, so that flow control counts it


class CoalescingTransport:
    """Sends all writes of one event loop iteration in one call: a response's head and its body.

    uvicorn writes them apart. Each write is a system call, a packet, and mostly a wake-up of the client.

    A close while the client may still send is a lingering close (RFC 9112, section 9.6): the write side is closed, and
    what arrives is discarded until the client closes. Otherwise the kernel answers unread data with a reset, which
    makes the client drop the response. `is_overdue` bounds it in bytes and time.
    """

    linger_s = 30.0  # in total
    linger_idle_s = 2.0  # without data
    linger_bytes = 256_000_000
    flush_s = 10.0  # for the client to read the response after a close

    def __init__(self, transport: Transport, loop: AbstractEventLoop) -> None:
        self.expects_data = False  # the client may still send part of a request
        self.received_eof = False
        self._transport = transport
        self._loop = loop
        self._parts: list[bytes] = []
        self._size = 0
        self._flow_paused = self._held = self._paused = False
        self._closing = self._lingering = False
        self._closed_at = self._last_data_at = 0.0
        self._discarded = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        if self._closing:
            return
        if not self._parts:
            self._loop.call_soon(self.flush)
        self._parts.append(data)
        self._size += len(data)
        if self._size > MAX_COALESCED_BYTES:
            self.flush()

    def flush(self) -> None:
        if self._parts:
            data = b"".join(self._parts)
            self._parts, self._size = [], 0
            if not self._transport.is_closing():
                self._transport.write(data)

    def pause_reading(self) -> None:
        """For flow control, which pauses while the application does not read."""
        self._flow_paused = True
        self._update_reading()

    def resume_reading(self) -> None:
        self._flow_paused = False
        self._update_reading()

    def hold_reading(self, held: bool) -> None:
        """For the protocol, while it has enough data to parse."""
        if held != self._held:
            self._held = held
            self._update_reading()

    def is_reading(self) -> bool:
        return not self._paused

    def close(self) -> None:
        if self.is_closing():
            return
        self.flush()
        self._closing = True
        self._closed_at = self._last_data_at = self._loop.time()
        if self.expects_data and not self.received_eof and not self._transport.is_closing():
            self._lingering = True
            self._update_reading()
            if self._transport.can_write_eof():  # not with TLS
                self._transport.write_eof()
        else:
            self._transport.close()

    def abort(self) -> None:
        self._closing = True
        self._parts.clear()
        self._transport.abort()

    def is_closing(self) -> bool:
        return self._closing or self._transport.is_closing()

    def discard(self, size: int) -> None:
        """Counts data that arrived after the close."""
        self._last_data_at = self._loop.time()
        self._discarded += size

    def is_overdue(self, now: float) -> bool:
        """Whether a close is to be completed by an abort. `now` is of the event loop's clock."""
        if not self._closing:
            return False
        if not self._lingering or self._transport.get_write_buffer_size():
            return now - self._closed_at > self.flush_s
        idle = now - self._last_data_at > self.linger_idle_s
        return idle or now - self._closed_at > self.linger_s or self._discarded > self.linger_bytes

    def _update_reading(self) -> None:
        pause = (self._flow_paused or self._held) and not self._lingering
        if pause == self._paused or self.received_eof or self._transport.is_closing():
            return
        self._paused = pause
        if pause:
            self._transport.pause_reading()
        else:
            self._transport.resume_reading()
