"""An event loop that measures the CPU time of each of its callbacks."""

import asyncio
import time
from collections.abc import Callable
from contextvars import Context
from typing import Any, ClassVar


class MeteredLoop(asyncio.SelectorEventLoop):
    """`longest` is the largest CPU time of one callback, in seconds, and its name; a test resets it.

    uvloop, which serves outside of tests, has the same callbacks. CPU time of the thread, unlike wall time, does not
    count the work of other threads and processes.
    """

    newest: ClassVar["MeteredLoop"]

    def __init__(self) -> None:
        self.longest = (0.0, "")
        super().__init__()
        MeteredLoop.newest = self

    def _metered(self, callback: Callable[..., object]) -> Callable[..., object]:
        def run(*args: object) -> None:
            start = time.thread_time()
            try:
                callback(*args)
            finally:
                seconds = time.thread_time() - start
                if seconds > self.longest[0]:
                    self.longest = (seconds, repr(callback))

        return run

    def call_soon(self, callback: Any, *args: Any, context: Context | None = None) -> asyncio.Handle:
        return super().call_soon(self._metered(callback), *args, context=context)

    def call_soon_threadsafe(self, callback: Any, *args: Any, context: Context | None = None) -> asyncio.Handle:
        return super().call_soon_threadsafe(self._metered(callback), *args, context=context)

    def call_at(self, when: float, callback: Any, *args: Any, context: Context | None = None) -> asyncio.TimerHandle:
        return super().call_at(when, self._metered(callback), *args, context=context)

    def _add_reader(self, fd: int, callback: Any, *args: Any) -> asyncio.Handle:
        return super()._add_reader(fd, self._metered(callback), *args)  # type: ignore[misc,no-any-return]

    def _add_writer(self, fd: int, callback: Any, *args: Any) -> asyncio.Handle:
        return super()._add_writer(fd, self._metered(callback), *args)  # type: ignore[misc,no-any-return]
