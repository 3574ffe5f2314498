"""Starting, ready, stopping: the phase of the process, and what a stop has to wait for."""

import asyncio
import logging
import multiprocessing
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from types import FrameType
from typing import Any

from app.errors import NotReady

logger = logging.getLogger(__name__)

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Phase(Enum):
    STARTING = "starting"
    READY = "ready"
    STOPPING = "shutting down"
    FAILED = "failed"  # its inference thread is gone or hangs; the process is about to end


class Lifecycle:
    """Belongs to one event loop; `admit` is entered for every prediction request."""

    def __init__(self) -> None:
        self.phase = Phase.STARTING
        self._in_flight = 0
        self._idle = asyncio.Event()
        self._idle.set()

    def check_alive(self) -> None:
        if self.phase is Phase.FAILED:
            raise NotReady("The inference thread is gone or hangs.", retry_after_s=5)

    def check_ready(self) -> None:
        if self.phase is not Phase.READY:
            raise NotReady(f"The service is {self.phase.value}.", retry_after_s=1)

    @contextmanager
    def admit(self) -> Iterator[None]:
        """A stop waits until the request is answered; raises NotReady unless the service is ready."""
        self.check_ready()
        self._in_flight += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._in_flight -= 1
            if not self._in_flight:
                self._idle.set()

    async def drain(self, limit_s: float) -> None:
        """Refuses new work and waits until what was accepted is answered, or limit_s seconds."""
        if self.phase is not Phase.FAILED:
            self.phase = Phase.STOPPING
        try:
            await asyncio.wait_for(self._idle.wait(), limit_s)
        except TimeoutError:
            logger.warning("%d requests were still unanswered after %g s", self._in_flight, limit_s)


@contextmanager
def draining_signals(lifecycle: Lifecycle, limit_s: float) -> Iterator[None]:
    """The first SIGINT or SIGTERM drains, then goes on to the server's own handler; a second one goes there at once.

    The server's handler closes the socket first and asks questions later. This way new requests get a 503 in the
    meantime.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    loop = asyncio.get_running_loop()
    before: dict[int, Any] = {int(number): signal.getsignal(number) for number in STOP_SIGNALS}
    tasks: set[asyncio.Task[None]] = set()

    async def drain_then(number: int) -> None:
        await lifecycle.drain(limit_s)
        before[number](number, None)

    def handle(number: int, frame: FrameType | None) -> None:
        if tasks or not callable(before[number]):
            before[number](number, frame)
        else:
            loop.call_soon_threadsafe(lambda: tasks.add(loop.create_task(drain_then(number))))

    for number in before:
        signal.signal(number, handle)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def ending_with_parent() -> Iterator[None]:
    """Stops a worker as SIGTERM does once the process that started it is gone, since nobody else would."""
    parent = multiprocessing.parent_process()
    if parent is None:
        yield
        return
    loop, sentinel = asyncio.get_running_loop(), parent.sentinel

    def stop() -> None:
        loop.remove_reader(sentinel)
        logger.warning("the process that started this worker is gone; the worker ends")
        signal.raise_signal(signal.SIGTERM)

    loop.add_reader(sentinel, stop)
    try:
        yield
    finally:
        loop.remove_reader(sentinel)
