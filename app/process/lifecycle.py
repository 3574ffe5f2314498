"""The phase of the process, what a graceful shutdown waits for, and the check that inference makes progress."""

import asyncio
import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from enum import Enum
from typing import Protocol

from app.errors import NotReady
from app.telemetry.log_stream import exit_process

PERIOD_S = 0.5
PIPELINE_THREADS = ("inference-", "decode-", "shadow")

Clock = Callable[[], float]

logger = logging.getLogger(__name__)


class Phase(Enum):
    STARTING = "starting"
    READY = "ready"
    STOPPING = "shutting down"
    FAILED = "failed"  # the inference thread died or is stalled; the process is about to exit


class Lifecycle:
    """Belongs to one event loop; `admit` is entered for every prediction request."""

    def __init__(self) -> None:
        self.phase = Phase.STARTING
        self.on_reload: list[Callable[[], Awaitable[object]]] = []  # awaited one after the other on SIGHUP
        self._in_flight = 0
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def in_flight(self) -> int:
        """Accepted requests without an answer."""
        return self._in_flight

    def check_alive(self) -> None:
        if self.phase is Phase.FAILED:
            raise NotReady("The inference thread died or is stalled.", retry_after_s=5)

    def check_ready(self) -> None:
        if self.phase is not Phase.READY:
            raise NotReady(f"The service is {self.phase.value}.", retry_after_s=1)

    @contextmanager
    def admit(self) -> Iterator[None]:
        """A shutdown waits until the request is answered; raises NotReady unless the service is ready."""
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
        if not self._in_flight:
            return
        try:
            await asyncio.wait_for(self._idle.wait(), limit_s)
        except TimeoutError:
            logger.warning("%d requests unanswered after %g s", self._in_flight, limit_s)

    async def reload(self) -> None:
        """Runs every `on_reload`; a failure is logged and leaves the others."""
        for reload in self.on_reload:
            try:
                await reload()
            except Exception:
                logger.exception("reload failed")


class Worker(Protocol):
    """What `watch` needs of the batcher; `oldest_start` is the time.monotonic of the batch that runs for longest."""

    @property
    def alive(self) -> bool: ...

    @property
    def failure(self) -> Exception | None: ...

    @property
    def oldest_start(self) -> float | None: ...

    def abort(self) -> None: ...


async def watch(batcher: Worker, lifecycle: Lifecycle, limit_s: float, clock: Clock = time.monotonic) -> None:
    """Runs until a batch runs for longer than limit_s, a thread dies or the device is lost; then ends the process.

    Only time in which this process itself runs counts: a check adds at most two periods, so that a container or
    machine that is paused in the middle of a batch goes on afterwards.
    """
    observed_s, last = 0.0, clock()
    while (reason := _failure(batcher, observed_s, limit_s)) is None:
        await asyncio.sleep(PERIOD_S)
        now, start = clock(), batcher.oldest_start
        observed_s = min(now - start, observed_s + min(now - last, 2 * PERIOD_S)) if start is not None else 0.0
        last = now
    logger.critical("%s; exiting", reason)
    lifecycle.phase = Phase.FAILED
    batcher.abort()
    signal.raise_signal(signal.SIGTERM)


def _failure(batcher: Worker, observed_s: float, limit_s: float) -> str | None:
    if batcher.failure is not None:
        return f"inference failed: {batcher.failure}"
    if not batcher.alive:
        return "inference thread died"
    return f"inference thread stalled for {observed_s:.1f} s" if observed_s > limit_s else None


def reload_other_workers() -> None:
    """Sends SIGHUP to the supervisor, if this process is one of its workers; it forwards the signal to all."""
    parent = multiprocessing.parent_process()
    if parent is not None and parent.pid is not None and hasattr(signal, "SIGHUP"):
        os.kill(parent.pid, signal.SIGHUP)


def exit_past_threads(status: int) -> None:
    """Exits at once if a thread of the pipeline still runs, else returns.

    The end of the interpreter stops such a thread inside the engine's C++ code, which ends the process with SIGABRT.
    """
    if any(thread.name.startswith(PIPELINE_THREADS) for thread in threading.enumerate()):
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        exit_process(status)
