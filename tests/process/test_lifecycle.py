import asyncio
import signal
from collections.abc import Iterator

import pytest

from app.process.lifecycle import Lifecycle, Phase, watch


class FakeBatcher:
    def __init__(self, alive: bool = True, failure: Exception | None = None, oldest_start: float | None = None) -> None:
        self.alive, self.failure, self.oldest_start = alive, failure, oldest_start
        self.aborted = False

    def abort(self) -> None:
        self.aborted = True


@pytest.fixture
def terminated() -> Iterator[list[int]]:
    received: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    yield received
    signal.signal(signal.SIGTERM, before)


async def ends(batcher: FakeBatcher, ticks: list[float], limit_s: float) -> bool:
    """Whether the process is failed by the last of the ticks, which are the times that the clock shows."""
    times = iter(ticks)

    def clock() -> float:
        if (tick := next(times, None)) is None:
            raise asyncio.CancelledError
        return tick

    task = asyncio.create_task(watch(batcher, Lifecycle(), limit_s, clock))
    await asyncio.wait([task], timeout=60)
    if task.cancelled():
        return False
    await task
    return batcher.aborted


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ticks", "failed"),
    [
        ([0, 0.5, 1.0, 1.5, 2.0], False),
        ([0, 0.9, 1.8, 2.7], True),  # a busy machine: every tick is late, and the batch does run
        ([0, 33, 33.5], False),  # a pause of 33 s
        ([0, 33, 66, 99], True),  # at most two periods of each tick count
    ],
)
def test_stall_counts_only_observed_time(ticks: list[float], failed: bool, terminated: list[int]) -> None:
    assert asyncio.run(ends(FakeBatcher(oldest_start=0.0), ticks, limit_s=2.0)) is failed
    assert terminated == [signal.SIGTERM] * failed


@pytest.mark.slow
def test_successive_batches_are_no_stall() -> None:
    class Busy(FakeBatcher):
        def __init__(self) -> None:
            super().__init__()
            self.starts = iter([0.4, 0.9, 1.4, 1.9, 2.4])

        @property
        def oldest_start(self) -> float | None:
            return next(self.starts)

        @oldest_start.setter
        def oldest_start(self, value: float | None) -> None: ...

    assert not asyncio.run(ends(Busy(), [0, 0.5, 1.0, 1.5, 2.0, 2.5], limit_s=0.2))


@pytest.mark.parametrize("batcher", [FakeBatcher(alive=False), FakeBatcher(failure=RuntimeError("lost"))])
def test_dead_thread_or_lost_device_fails_the_process(batcher: FakeBatcher, terminated: list[int]) -> None:
    assert asyncio.run(ends(batcher, [0, 1], limit_s=2.0))
    assert terminated == [signal.SIGTERM]


def test_failing_reload_does_not_keep_others_from_theirs(caplog: pytest.LogCaptureFixture) -> None:
    called: list[str] = []

    async def run() -> None:
        lifecycle = Lifecycle()

        async def fails() -> None:
            raise ValueError("broken")

        async def works() -> None:
            called.append("works")

        lifecycle.on_reload += [fails, works]
        await lifecycle.reload()

    asyncio.run(run())
    assert called == ["works"]
    assert "reload failed" in caplog.text


def test_drain_waits_for_admitted_requests_only() -> None:
    async def run() -> list[str]:
        lifecycle, events = Lifecycle(), list[str]()
        lifecycle.phase = Phase.READY
        with lifecycle.admit():
            drained = asyncio.create_task(lifecycle.drain(60))
            drained.add_done_callback(lambda _: events.append("drained"))
            await asyncio.sleep(0.05)
            events.append("answered")
        await drained
        await lifecycle.drain(0)
        return events

    assert asyncio.run(run()) == ["answered", "drained"]
