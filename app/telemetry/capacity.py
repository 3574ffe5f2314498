"""Capacity of the engine and utilization of each resource, over the last minute.

Utilization by the utilization law (Denning and Buzen 1978): throughput times service demand. The demand of an image is
that in a full batch. So utilization is proportional to the load, while the mere share of time in which the engine runs
is not: at low load it runs small batches, which cost more an image.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable
from threading import Lock
from typing import NamedTuple

from app.engines.batch_cost import BatchCost

WINDOW_S = 60.0
PERIOD_S = 5.0
MIN_BUSY_S = 0.1  # of batches in the window; fewer leave the capacity as it was
INTERVALS = 16  # merged periods of inference; a batch that runs beside the last of so many is rare

Clock = Callable[[], float]


class Window:
    """Increases of cumulative totals over the last WINDOW_S seconds, or since the first sample."""

    def __init__(self, clock: Clock = time.monotonic) -> None:
        self._clock = clock
        self._samples: deque[tuple[float, ...]] = deque()

    def add(self, *totals: float) -> tuple[float, ...]:
        """The seconds in the window, at least PERIOD_S, then the increase of each total."""
        samples = self._samples
        samples.append((self._clock(), *totals))
        while len(samples) > 2 and samples[1][0] <= samples[-1][0] - WINDOW_S:
            samples.popleft()
        seconds, *increases = (new - old for new, old in zip(samples[-1], samples[0], strict=True))
        return max(seconds, PERIOD_S), *increases


class Usage(NamedTuple):
    """Images/s that the engine can process, and the share of it in use, from 0 to 1."""

    images_per_s: float
    utilization: float


class EngineUsage:
    """Of the batches of one engine. Threads call `observe_batch`.

    Capacity is images/s in full batches, at the speed of the last minute: the rate measured at the start, times the
    ratio of the time that the window's batches would have taken then to the time in which the engine ran. Full batches
    only give images over seconds. Hard images for a cascade and a busy CPU lower it; small batches do not.

    This is not the rate behind `Retry-After`: that is of the last few batches, whatever their size.
    """

    def __init__(self, cost: BatchCost, clock: Clock = time.monotonic) -> None:
        self._clock = clock
        self._lock = Lock()
        self._batches = self._images = 0
        self._busy_s = 0.0
        self._intervals: deque[tuple[float, float]] = deque(maxlen=INTERVALS)  # start and end, disjoint, newest last
        self._restart(cost)

    def observe_batch(self, size: int, seconds: float) -> None:
        """A batch that ends now. Time in which several run counts once."""
        end = self._clock()
        with self._lock:
            self._batches += 1
            self._images += size
            start, intervals = end - seconds, self._intervals
            while intervals and intervals[-1][1] > start:
                earlier = intervals.pop()
                self._busy_s -= earlier[1] - earlier[0]
                start = min(start, earlier[0])
            intervals.append((start, end))
            self._busy_s += end - start

    def sample(self, cost: BatchCost) -> Usage:
        """Of the last minute; to be called regularly. The cost of another model starts a new window."""
        if cost is not self._cost:
            self._restart(cost)
        elapsed_s, batches, images, busy_s = self._add_sample()
        if busy_s >= MIN_BUSY_S:
            self._images_per_s = self._cost.images_per_s * self._cost.seconds(batches, images) / busy_s
        return Usage(self._images_per_s, min(1.0, images / elapsed_s / self._images_per_s))

    def _restart(self, cost: BatchCost) -> None:
        self._cost = cost
        self._images_per_s = cost.images_per_s
        self._window = Window(self._clock)
        self._add_sample()

    def _add_sample(self) -> tuple[float, ...]:
        with self._lock:
            totals = self._batches, self._images, self._busy_s
        return self._window.add(*totals)


class BusyShare:
    """The share of the last minute in which the busiest of some threads worked, from 0 to 1.

    `busy_s` gives the seconds of each thread since its start.
    """

    def __init__(self, busy_s: Callable[[], tuple[float, ...]], clock: Clock = time.monotonic) -> None:
        self._busy_s = busy_s
        self._window = Window(clock)
        self._window.add(*busy_s())

    def sample(self) -> float:
        elapsed_s, *busy_s = self._window.add(*self._busy_s())
        return min(1.0, max(busy_s) / elapsed_s)


async def repeat(sample: Callable[[], None], period_s: float = PERIOD_S) -> None:
    """Samples for ever, on the event loop."""
    while True:
        sample()
        await asyncio.sleep(period_s)
