"""A request's body into memory, under its limit, as sent or without its content coding.

No step holds the interpreter lock for more than 4 ms. What grows by joining or by reallocation does, at 32 MB.
"""

import zlib
from collections.abc import AsyncIterator, Mapping
from time import thread_time

import numpy as np
from starlette.types import Receive

from app.errors import ClientDisconnected, MalformedUpload, TooLarge, UnsupportedImage

JOINED_BYTES = 1 << 20  # up to which a body is kept in its chunks
RESERVED_BYTES = 64 << 20  # at most, for a declared Content-Length
BLOCK = 65_536  # bytes that are inflated at a time
INFLATED_BLOCK = 1 << 20
INFLATE_S = 0.5  # of CPU for a body; 32 MB that inflate to 32 MB take 0.1, as many of empty blocks 2.3

Headers = Mapping[bytes, bytes]
Body = bytes | memoryview


class Collector:
    """Chunks to one body of at most `limit` bytes, perhaps `expected`; raises TooLarge with `message`."""

    def __init__(self, limit: int, message: str, expected: int = 0) -> None:
        self.size = 0
        self._limit = limit
        self._expected = min(expected, RESERVED_BYTES)
        self._message = message
        self._chunks: list[bytes] = []
        self._array = np.empty(0, np.uint8)

    def add(self, chunk: bytes) -> None:
        start = self.size
        self.size += len(chunk)
        if self.size > self._limit:
            raise TooLarge(self._message)
        if self.size <= JOINED_BYTES:
            self._chunks.append(chunk)
            return
        if self.size > len(self._array):
            self._grow(start)
        self._array[start : self.size] = np.frombuffer(chunk, np.uint8)

    def _grow(self, used: int) -> None:
        """To twice the size, which copies 16 MB at most on the way to 32, or to what is expected."""
        former = self._array if len(self._array) else np.frombuffer(b"".join(self._chunks), np.uint8)
        self._array = np.empty(min(self._limit, max(2 * self.size, self._expected)), np.uint8)
        self._array[:used] = former[:used]
        self._chunks = []

    def body(self) -> Body:
        if len(self._array):
            return self._array[: self.size].data.toreadonly()
        return self._chunks[0] if len(self._chunks) == 1 else b"".join(self._chunks)


async def read_body(receive: Receive, headers: Headers, limit: int) -> Body:
    """The whole body as sent; raises TooLarge as soon as it passes the limit, and ClientDisconnected."""
    declared = headers.get(b"content-length", b"")
    collector = Collector(limit, _too_large(limit), int(declared[:20]) if declared.isdigit() else 0)
    async for chunk in chunks(receive, headers, limit):
        collector.add(chunk)
    return collector.body()


def content_coding(headers: Headers) -> str:
    """The Content-Encoding in lower case; empty for none or identity."""
    coding = headers.get(b"content-encoding", b"").decode("latin-1").strip().lower()
    return "" if coding == "identity" else coding


def decompress(body: Body, coding: str, limit: int, max_cpu_s: float = INFLATE_S) -> Body:
    """The body without its content coding; raises TooLarge as soon as it passes a limit, and MalformedUpload."""
    if coding in ("", "identity"):
        return body
    if coding not in ("gzip", "deflate"):
        raise UnsupportedImage("Send the body as it is, or with a Content-Encoding of gzip or deflate.")
    inflater = zlib.decompressobj(zlib.MAX_WBITS | 32)  # detects the header of either
    content = Collector(limit, f"The body has over {limit} bytes when decompressed.")
    place, end = 0, thread_time() + max_cpu_s
    try:
        while place < len(body) and not inflater.eof:
            piece = body[place : place + BLOCK]
            place += len(piece)
            inflated = inflater.decompress(piece, INFLATED_BLOCK)
            content.add(inflated)
            while len(inflated) == INFLATED_BLOCK:
                inflated = inflater.decompress(inflater.unconsumed_tail, INFLATED_BLOCK)
                content.add(inflated)
            if thread_time() > end:
                raise TooLarge(f"The {coding} data takes over {max_cpu_s:g} s of CPU to decompress.")
    except zlib.error as error:
        raise MalformedUpload(f"The {coding} data is broken.") from error
    if not inflater.eof or inflater.unused_data or place < len(body):
        raise MalformedUpload(f"The {coding} data is incomplete, or more follows it.")
    return content.body()


async def chunks(receive: Receive, headers: Headers, limit: int) -> AsyncIterator[bytes]:
    """The body as it arrives; raises TooLarge as soon as it passes the limit, and ClientDisconnected."""
    declared = headers.get(b"content-length", b"0")
    if declared.isdigit() and int(declared[:20]) > limit:
        raise TooLarge(_too_large(limit))
    total, more = 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnected("The caller left before the body was complete.")
        chunk = message.get("body", b"")
        total += len(chunk)
        if total > limit:
            raise TooLarge(_too_large(limit))
        yield chunk
        more = message.get("more_body", False)


def _too_large(limit: int) -> str:
    return f"The body has over {limit} bytes."
