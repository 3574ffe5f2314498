"""A thread for bodies whose parsing would hold the event loop for milliseconds."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from math import ceil
from time import perf_counter
from typing import TypeVar

from app.errors import QueueFull
from app.inference.pipeline import Deadline

MAX_BACKLOG_S = 2.0  # of calls that wait, at the mean duration of the last ones
SMOOTHING = 0.2  # weight of the newest call in that mean

Result = TypeVar("Result")


class ParseThread:
    """Runs one call after the other. `run` belongs to one event loop."""

    def __init__(self, max_backlog_s: float = MAX_BACKLOG_S) -> None:
        self._max_backlog_s = max_backlog_s
        self._executor = ThreadPoolExecutor(1, "parse")
        self._unfinished = 0
        self._call_s = 0.0

    async def run(self, call: Callable[[], Result], deadline: Deadline) -> Result:
        """What the call returns or raises. A call that is cancelled before its start never runs.

        Raises QueueFull where the calls before it would take too long, and DeadlineExceeded.
        """
        backlog_s = self._unfinished * self._call_s
        if backlog_s > self._max_backlog_s:
            raise QueueFull("Too many large or compressed bodies are waiting to be parsed.", ceil(backlog_s))
        self._unfinished += 1
        try:
            async with asyncio.timeout(deadline.left_s):
                return await asyncio.get_running_loop().run_in_executor(self._executor, self._timed, call)
        except TimeoutError as error:
            raise deadline.exceeded() from error
        finally:
            self._unfinished -= 1

    def close(self) -> None:
        """Drops what has not started, and waits for the call that runs."""
        self._executor.shutdown(cancel_futures=True)

    def _timed(self, call: Callable[[], Result]) -> Result:
        start = perf_counter()
        try:
            return call()
        finally:
            call_s = perf_counter() - start
            mean_s = self._call_s or call_s
            self._call_s = mean_s + SMOOTHING * (call_s - mean_s)
