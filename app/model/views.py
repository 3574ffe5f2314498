"""Views of an image for test-time augmentation: flips, and shifts by one pixel (cf. Krizhevsky et al. 2012)."""

from typing import Literal

import numpy as np
from numpy.typing import NDArray

View = Literal["identity", "flip", "up_left", "down_right", "flip_up_left", "flip_down_right"]

# Whether the image is flipped, after it has moved by so many pixels up and to the left.
_TRANSFORMS: dict[View, tuple[bool, int]] = {
    "identity": (False, 0),
    "flip": (True, 0),
    "up_left": (False, 1),
    "down_right": (False, -1),
    "flip_up_left": (True, 1),
    "flip_down_right": (True, -1),
}


def transform(images: NDArray[np.uint8], view: View) -> NDArray[np.uint8]:
    """The view of each image uint8 [N, H, W, C]. Pixels that move in are a reflection at the edge."""
    flipped, offset = _TRANSFORMS[view]
    if offset:
        rows, columns = (_indices(size, offset) for size in images.shape[1:3])
        images = images[:, rows[:, None], columns]
    return images[:, :, ::-1] if flipped else images


def _indices(size: int, offset: int) -> NDArray[np.intp]:
    shifted = np.abs(np.arange(size) + offset)
    return np.minimum(shifted, 2 * (size - 1) - shifted)
