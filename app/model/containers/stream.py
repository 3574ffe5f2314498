"""A file for Pillow made of parts of an upload, read without a copy of it."""

import io
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from time import thread_time

from app.errors import UndecodableImage

Part = bytes | memoryview

WINDOW = 1 << 18  # bytes that are searched while the interpreter lock is held


class Stream(io.RawIOBase):
    """Seekable. Reads raise UndecodableImage once this thread has used so many seconds of CPU since construction.

    A copy of 10 MB would hold the interpreter lock, and with it the event loop, for 10 ms.
    """

    def __init__(self, parts: Sequence[Part], seconds: float) -> None:
        self._parts = parts
        self._starts = list(accumulate(map(len, parts), initial=0))
        self._place = 0
        self._end = thread_time() + seconds

    def read(self, size: int | None = -1, /) -> bytes:
        if thread_time() > self._end:
            raise UndecodableImage("The image takes far more time to decode than its size needs.")
        rest = self._starts[-1] - self._place
        rest = rest if size is None or size < 0 else min(size, rest)
        index = bisect_right(self._starts, self._place) - 1
        pieces = []
        while rest > 0:
            start = self._place - self._starts[index]
            piece = self._parts[index][start : start + rest]
            pieces.append(piece)
            rest -= len(piece)
            self._place += len(piece)
            index += 1
        return b"".join(pieces)

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._starts[-1]}[whence]
        self._place = min(max(0, base + offset), self._starts[-1])
        return self._place

    def tell(self) -> int:
        return self._place


def find(data: bytes, needle: bytes, start: int, end: int) -> int:
    """As data.find(needle, start, end), in windows between which other threads may run."""
    for place in range(start, end, WINDOW):
        found = data.find(needle, place, min(end, place + WINDOW + len(needle) - 1))
        if found >= 0:
            return found
    return -1
