"""Parsing in a thread: bounded, until the deadline, and never for a caller that has left."""

import asyncio
import threading
from collections.abc import Iterator
from contextlib import closing, suppress

import pytest

from app.api.parse_thread import ParseThread
from app.errors import DeadlineExceeded, QueueFull
from app.inference.pipeline import Deadline


@pytest.fixture
def thread() -> Iterator[ParseThread]:
    with closing(ParseThread(max_backlog_s=0.0)) as thread:
        yield thread


def later() -> Deadline:
    return Deadline.after(60.0)


async def blocked(thread: ParseThread, release: threading.Event) -> asyncio.Task[bool]:
    """A call that runs until `release` is set."""
    started = threading.Event()

    def call() -> bool:
        started.set()
        return release.wait(60)

    task = asyncio.create_task(thread.run(call, later()))
    while not started.is_set():
        await asyncio.sleep(0.001)
    return task


def test_result_and_error_of_a_call_are_those_of_run(thread: ParseThread) -> None:
    assert asyncio.run(thread.run(lambda: 3, later())) == 3
    with pytest.raises(ZeroDivisionError):
        asyncio.run(thread.run(lambda: 1 // 0, later()))


def test_call_after_the_deadline_is_a_504(thread: ParseThread) -> None:
    async def run() -> None:
        release = threading.Event()
        task = await blocked(thread, release)
        with pytest.raises(DeadlineExceeded):
            await thread.run(lambda: 3, Deadline.after(0.01))
        release.set()
        assert await task

    asyncio.run(run())


def test_cancelled_call_never_runs(thread: ParseThread) -> None:
    async def run() -> None:
        ran, release = threading.Event(), threading.Event()
        first = await blocked(thread, release)
        waiting = asyncio.create_task(thread.run(ran.set, later()))
        await asyncio.sleep(0)
        waiting.cancel()
        with suppress(asyncio.CancelledError):
            await waiting
        release.set()
        await first
        assert not ran.is_set()

    asyncio.run(run())


def test_backlog_over_the_limit_is_a_429(thread: ParseThread) -> None:
    async def run() -> None:
        await thread.run(lambda: None, later())  # the mean duration is above 0 from now on
        release = threading.Event()
        task = await blocked(thread, release)
        with pytest.raises(QueueFull) as refused:
            await thread.run(lambda: None, later())
        assert refused.value.retry_after_s >= 1
        release.set()
        await task
        await thread.run(lambda: None, later())

    asyncio.run(run())
