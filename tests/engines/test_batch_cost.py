"""The time of a batch by its size, with a clock that a fake engine advances."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from app.engines import batch_cost
from app.engines.batch_cost import BatchCost

IMAGES = np.arange(3, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 2, 3), np.uint8)
TIMES = st.floats(0, 10)


class TimedEngine:
    """Advances its clock by 1 s a batch, and by 0.1 s times the first byte of each image."""

    def __init__(self) -> None:
        self.now = 0.0
        self.batches: list[list[int]] = []

    def __call__(self, images: NDArray[np.uint8]) -> None:
        self.batches.append(images[:, 0, 0, 0].tolist())
        self.now += 1 + 0.1 * sum(self.batches[-1])

    def clock(self) -> float:
        return self.now


def test_cost_is_that_of_all_images() -> None:
    engine = TimedEngine()
    cost = batch_cost.measure(engine, IMAGES, 6, engine.clock)
    assert engine.batches == [[0], [1], [2], [0, 1, 2, 0, 1, 2]]
    assert cost == pytest.approx(BatchCost(1.0, 0.1, 6))
    assert cost.images_per_s == pytest.approx(6 / 1.6)


def test_batch_of_one_has_one_cost() -> None:
    engine = TimedEngine()
    assert batch_cost.measure(engine, IMAGES[1:2], 1, engine.clock).images_per_s == pytest.approx(1 / 1.1)


def test_seconds_of_several_batches_add_up() -> None:
    assert BatchCost(0.5, 0.25, 64).seconds(batches=3, images=8) == 3.5


@given(TIMES, TIMES, st.integers(1, 1024))
def test_costs_are_never_negative(one_s: float, largest_s: float, largest: int) -> None:
    cost = BatchCost.fit(one_s, largest_s, largest)
    assert cost.call_s >= -1e-9
    assert cost.image_s >= 0
    assert cost.seconds(1, largest) == pytest.approx(largest_s, abs=1e-8)
    assert cost.images_per_s > 0


def test_slower_single_image_raises_the_cost_of_a_call() -> None:
    assert BatchCost.fit(2.0, 2.0, 4) == BatchCost(2.0, 0.0, 4)
    assert BatchCost.fit(0.1, 2.0, 4) == BatchCost(0.0, 0.5, 4)
