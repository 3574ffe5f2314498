"""A stream for log lines that never blocks its writers."""

import io
import logging
import os
import select
import threading
import time
from collections import deque
from collections.abc import Callable
from functools import lru_cache
from typing import NoReturn

FLUSH_S = 0.1
EXIT_S = 0.5  # for pending lines before the process exits

logger = logging.getLogger(__name__)


class LogStream(io.TextIOBase):
    """A text stream for a file descriptor whose `write` never blocks: a thread writes for all others.

    A reader that stops reading, a full disk or a closed pipe must not stop the service: beyond `limit` pending texts
    further ones are dropped and counted, and the count is logged once writing works again.
    """

    def __init__(self, descriptor: int, limit: int = 10_000) -> None:
        self.dropped = 0
        self._descriptor = descriptor
        self._limit = limit
        self._pending: deque[str] = deque()
        self._wake, self._flush_now = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="log", daemon=True)
        self._lock = threading.Lock()
        self._busy = False
        self._on_drop: Callable[[int], object] = lambda count: None

    def on_drop(self, call: Callable[[int], object]) -> None:
        """Calls `call(count)` for the texts dropped so far, and whenever further ones are dropped."""
        with self._lock:
            self._on_drop = call
            call(self.dropped)

    def write(self, text: str) -> int:
        if len(self._pending) >= self._limit:
            self._drop(1)
            return len(text)
        self._pending.append(text)
        if not self._wake.is_set():
            self._wake.set()
            self._start()
        return len(text)

    def drain(self, timeout_s: float) -> None:
        """Waits until all is written, at most timeout_s seconds."""
        deadline = time.monotonic() + timeout_s
        while (self._pending or self._busy) and self._thread.is_alive() and time.monotonic() < deadline:
            self._flush_now.set()
            self._thread.join(0.005)

    def _start(self) -> None:
        with self._lock:
            if self._thread.ident is None:
                self._thread.start()

    def _run(self) -> None:
        lost = 0
        while self._wake.wait():
            self._flush_now.wait(FLUSH_S)  # one call of the kernel for all lines of this time
            self._flush_now.clear()
            self._busy = True
            self._wake.clear()
            texts = [self._pending.popleft() for _ in range(len(self._pending))]
            try:
                _write_all(self._descriptor, "".join(texts).encode("utf-8", "backslashreplace"))
            except OSError:
                self._drop(len(texts))
            else:
                lost = self._report(lost)
            self._busy = False

    def _drop(self, count: int) -> None:
        with self._lock:
            self.dropped += count
            self._on_drop(count)

    def _report(self, before: int) -> int:
        if self.dropped > before:
            logger.warning("%d log lines dropped: stderr could not be written to", self.dropped - before)
        return self.dropped


def _write_all(descriptor: int, data: bytes) -> None:
    while data:
        try:
            data = data[os.write(descriptor, data) :]
        except BlockingIOError:  # another process has made the shared pipe or terminal non-blocking
            select.select([], [descriptor], [])


@lru_cache(1)
def stderr() -> LogStream:
    """The stream that all log lines of this process go through."""
    return LogStream(2)


def exit_process(status: int) -> NoReturn:
    """Exits without any clean-up but that of the log: for a process with a thread that does not return."""
    stderr().drain(EXIT_S)
    os._exit(status)
