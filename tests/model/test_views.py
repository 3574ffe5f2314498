"""Views of an image: flips, and shifts by one pixel with a reflected edge."""

from typing import get_args

import numpy as np
import pytest

from app.model.card import Stage
from app.model.views import View, transform

ROWS = np.arange(12, dtype=np.uint8).reshape(1, 3, 4, 1)


@pytest.mark.parametrize(
    ("view", "expected"),
    [
        ("identity", [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]),
        ("flip", [[3, 2, 1, 0], [7, 6, 5, 4], [11, 10, 9, 8]]),
        ("up_left", [[5, 6, 7, 6], [9, 10, 11, 10], [5, 6, 7, 6]]),
        ("down_right", [[5, 4, 5, 6], [1, 0, 1, 2], [5, 4, 5, 6]]),
        ("flip_up_left", [[6, 7, 6, 5], [10, 11, 10, 9], [6, 7, 6, 5]]),
        ("flip_down_right", [[6, 5, 4, 5], [2, 1, 0, 1], [6, 5, 4, 5]]),
    ],
)
def test_view_moves_pixels(view: View, expected: list[list[int]]) -> None:
    assert transform(ROWS, view)[0, :, :, 0].tolist() == expected


def test_every_view_keeps_the_shape() -> None:
    images = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)
    assert {transform(images, view).shape for view in get_args(View)} == {images.shape}


@pytest.mark.parametrize(("hflip", "view"), [(False, "identity"), (True, "flip")])
def test_flip_of_older_files_is_read(hflip: bool, view: View) -> None:
    assert Stage.model_validate({"network": 0, "hflip": hflip, "average_last": 1}).views == (view,)
