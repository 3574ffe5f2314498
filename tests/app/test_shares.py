from math import ceil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.model.shares import cut

few = st.integers(1, 70)


@given(few, few, few, few)
def test_slices_hold_each_image_once_and_no_more_than_allowed(count: int, threads: int, least: int, more: int) -> None:
    slices = cut(count, threads, least, least + more)
    assert [i for part in slices for i in range(count)[part]] == list(range(count))
    sizes = [part.stop - part.start for part in slices]
    assert len(sizes) == 1 or max(sizes) <= least + more
    assert len(sizes) <= threads * ceil(count / (threads * (least + more)))


@pytest.mark.parametrize(
    ("count", "threads", "sizes"),
    [(1, 2, [1]), (7, 2, [7]), (8, 2, [4, 4]), (24, 2, [6, 6, 6, 6]), (64, 2, [8] * 8), (64, 1, [64]), (64, 32, [64])],
)
def test_threads_have_equal_parts_or_none(count: int, threads: int, sizes: list[int]) -> None:
    assert [part.stop - part.start for part in cut(count, threads, 4, 8)] == sizes
