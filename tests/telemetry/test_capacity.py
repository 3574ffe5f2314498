"""Capacity and utilization of simulated batches, on a clock that the tests set."""

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.engines.batch_cost import BatchCost
from app.telemetry.capacity import PERIOD_S, WINDOW_S, BusyShare, EngineUsage, Usage, Window

COST = BatchCost(call_s=0.001, image_s=0.001, largest=63)
FULL_RATE = 63 / 0.064


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Simulation:
    """An engine that runs batches at `slowdown` times the cost, sampled every period."""

    def __init__(self, cost: BatchCost = COST) -> None:
        self.clock = Clock()
        self.usage = EngineUsage(cost, self.clock)
        self.cost = cost

    def run(self, size: Callable[[], int], idle_s: float, seconds: float, slowdown: float = 1.0) -> Usage:
        """Batches with so much time between them."""
        end, due = self.clock.now + seconds, self.clock.now + PERIOD_S
        while self.clock.now < end:
            images = size()
            duration = slowdown * self.cost.seconds(1, images)
            self.clock.now += duration
            self.usage.observe_batch(images, duration)
            self.clock.now += idle_s
            if self.clock.now >= due:
                due += PERIOD_S
                self.usage.sample(self.cost)
        return self.usage.sample(self.cost)


def test_capacity_before_traffic_is_that_of_the_warm_up() -> None:
    assert Simulation().usage.sample(COST) == Usage(pytest.approx(FULL_RATE), 0.0)


def test_full_batches_give_images_over_seconds() -> None:
    usage = Simulation().run(lambda: 63, idle_s=0.0, seconds=70, slowdown=1.5)
    assert usage.images_per_s == pytest.approx(FULL_RATE / 1.5)
    assert usage.utilization == pytest.approx(1.0, abs=0.01)


def test_small_batches_do_not_lower_the_capacity() -> None:
    usage = Simulation().run(lambda: 1, idle_s=0.0, seconds=70)
    assert usage.images_per_s == pytest.approx(FULL_RATE)
    assert usage.utilization == pytest.approx(500 / FULL_RATE, abs=0.01)  # though the engine always runs


@pytest.mark.parametrize("slowdown", [0.8, 3.0])
def test_utilization_is_proportional_to_the_load(slowdown: float) -> None:
    sizes = np.random.default_rng(0)
    usages = [
        Simulation().run(lambda: int(sizes.integers(1, 9)), idle_s=idle_s, seconds=120, slowdown=slowdown)
        for idle_s in (0.05, 0.1, 0.2)
    ]
    assert [usage.images_per_s for usage in usages] == pytest.approx([FULL_RATE / slowdown] * 3)
    images_per_s = [4.5 / (idle_s + slowdown * COST.seconds(1, 4.5)) for idle_s in (0.05, 0.1, 0.2)]
    expected = [rate / FULL_RATE * slowdown for rate in images_per_s]
    assert [usage.utilization for usage in usages] == pytest.approx(expected, rel=0.1)


def test_harder_images_lower_the_capacity_within_the_window() -> None:
    simulation = Simulation()
    simulation.run(lambda: 32, idle_s=0.03, seconds=2 * WINDOW_S)
    usage = simulation.run(lambda: 32, idle_s=0.03, seconds=WINDOW_S + PERIOD_S, slowdown=2)
    assert usage.images_per_s == pytest.approx(FULL_RATE / 2)


def test_idle_engine_keeps_its_capacity() -> None:
    simulation = Simulation()
    simulation.run(lambda: 63, idle_s=0.0, seconds=70, slowdown=2)
    for _ in range(20):
        simulation.clock.now += PERIOD_S
        usage = simulation.usage.sample(COST)
    assert usage == Usage(pytest.approx(FULL_RATE / 2), 0.0)


def test_single_slow_batch_does_not_set_the_capacity() -> None:
    simulation = Simulation()
    simulation.clock.now += 10
    simulation.usage.observe_batch(1, 0.05)
    assert simulation.usage.sample(COST).images_per_s == pytest.approx(FULL_RATE)


def test_another_model_starts_a_new_window() -> None:
    simulation = Simulation()
    simulation.run(lambda: 63, idle_s=0.0, seconds=70, slowdown=2)
    slower = BatchCost(0.01, 0.01, 64)
    assert simulation.usage.sample(slower) == Usage(pytest.approx(slower.images_per_s), 0.0)


@given(st.lists(st.tuples(st.integers(0, 100), st.integers(1, 30)), min_size=1, max_size=14))
def test_concurrent_batches_count_once(batches: list[tuple[int, int]]) -> None:
    """In the order of their ends; the busy time is the union of their intervals."""
    clock = Clock()
    usage, zero = EngineUsage(BatchCost(0.0, 1.0, 1), clock), clock.now
    covered: set[int] = set()
    for start, length in sorted(batches, key=lambda batch: batch[0] + batch[1]):
        clock.now = zero + start + length
        usage.observe_batch(1, length)
        covered |= set(range(start, start + length))
    assert usage.sample(usage._cost).images_per_s == pytest.approx(len(batches) / len(covered))


def test_window_forgets_what_is_older() -> None:
    clock = Clock()
    window = Window(clock)
    window.add(0.0)
    for second in range(1, 200):
        clock.now += 1
        seconds, increase = window.add(second * 3.0)
    assert (seconds, increase) == (WINDOW_S, 3 * WINDOW_S)


def test_first_moments_count_as_a_whole_period() -> None:
    clock = Clock()
    window = Window(clock)
    window.add(0.0)
    clock.now += 0.001
    assert window.add(0.001) == (PERIOD_S, 0.001)


def test_busy_share_is_that_of_the_busiest_thread() -> None:
    clock, busy = Clock(), [0.0, 0.0]
    share = BusyShare(lambda: (busy[0], busy[1]), clock)
    clock.now, busy[:] = clock.now + 40, [10.0, 30.0]
    assert share.sample() == 0.75
    clock.now, busy[:] = clock.now + WINDOW_S, [40.0, 30.0]
    assert share.sample() == 0.5
