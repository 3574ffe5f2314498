import asyncio
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from app.inference import pipeline
from app.inference.batcher import Answer, Batcher
from app.model import tta
from app.model.preprocessing import Pixels

LEFT = np.array([[[9, 9, 9], [0, 0, 0]]], np.uint8)


class Seer:
    """Stands in for the network: 60 % for class 0 where the left is bright, 80 % for class 1 where the right is."""

    def __init__(self) -> None:
        self.seen = 0
        self.batcher: Batcher[Pixels, NDArray[np.float32]] = Batcher(self, [1, 2, 4], max_queue=8)

    def __call__(self, items: Sequence[Pixels], alone: bool) -> list[NDArray[np.float32]]:
        self.seen += len(items)
        return [np.array([0.6, 0.4] if item[0, 0, 0] else [0.2, 0.8], np.float32) for item in items]

    def look(self, count: int, lossy: Sequence[int], sure: float) -> list[NDArray[np.float32]]:
        self.batcher.start()
        try:
            return asyncio.run(pipeline.take(self.batcher, [LEFT] * count, lossy, sure, timeout_s=10)).results
        finally:
            self.batcher.close(5)


def test_lossy_pictures_in_doubt_are_seen_twice_and_both_looks_count_the_same() -> None:
    seer = Seer()
    first, second, third = seer.look(3, lossy=[0, 2], sure=0.9)
    assert seer.seen == 5
    assert second == pytest.approx([0.6, 0.4])
    both = np.sqrt([0.6 * 0.2, 0.4 * 0.8])
    assert first == pytest.approx(both / both.sum())
    assert third == pytest.approx(first)


@pytest.mark.parametrize(("lossy", "sure"), [([], 1.0), ([0], 0.6), ([0], 0.0)])
def test_one_look_is_enough_for_others(lossy: list[int], sure: float) -> None:
    seer = Seer()
    assert seer.look(1, lossy, sure)[0] == pytest.approx([0.6, 0.4])
    assert seer.seen == 1


class Closing(Batcher[Pixels, NDArray[np.float32]]):
    """Takes one request, then no more."""

    async def submit(
        self, items: Sequence[Pixels], timeout_s: float, again: bool = False
    ) -> Answer[NDArray[np.float32]]:
        answered = await super().submit(items, timeout_s, again)
        self.close()
        return answered


def test_where_no_second_look_can_be_taken_the_first_is_the_answer() -> None:
    seer = Seer()
    seer.batcher = Closing(seer, [1], max_queue=8)
    assert seer.look(1, lossy=[0], sure=0.9)[0] == pytest.approx([0.6, 0.4])
    assert seer.seen == 1


shares = st.lists(st.floats(0, 1, width=32), min_size=3, max_size=3).filter(lambda each: sum(each) > 0.1)


@given(shares, shares)
def test_two_looks_together_are_probabilities_whatever_their_order(one: list[float], other: list[float]) -> None:
    a, b = (np.array(each, np.float32) / np.float32(sum(each)) for each in (one, other))
    together = tta.merged(a, b)
    assert together.dtype == np.float32
    assert together.sum() == pytest.approx(1, abs=1e-5)
    assert together == pytest.approx(tta.merged(b, a))
    if a.argmax() == b.argmax() and np.sort(a)[-2] < a.max() and np.sort(b)[-2] < b.max():
        assert together.argmax() == a.argmax()
