"""Selective test-time augmentation: the mean of an image's and its horizontal flip's log-probabilities."""

import numpy as np
from numpy.typing import NDArray

from app.model.preprocessing import Pixels

DEFAULT_THRESHOLD = 0.7  # docs/experiments: half as many flips as 0.9 for most of the gain
PROBABILITY_FLOOR = 1e-12  # replaces a probability rounded to 0, whose logarithm would dominate the mean


def is_uncertain(probabilities: NDArray[np.float32], threshold: float) -> NDArray[np.bool_]:
    """Whether no class reaches the threshold: [..., classes] to [...]."""
    uncertain: NDArray[np.bool_] = probabilities.max(-1) < threshold
    return uncertain


def hflip(pixels: Pixels) -> Pixels:
    """uint8 [..., H, W, 3], left and right exchanged."""
    return np.ascontiguousarray(pixels[..., ::-1, :])


def geometric_mean(first: NDArray[np.float32], second: NDArray[np.float32]) -> NDArray[np.float32]:
    """The normalised geometric mean of two sets of probabilities [..., classes]."""
    floor = np.float32(PROBABILITY_FLOOR)
    product = np.sqrt(np.maximum(first, floor)) * np.sqrt(np.maximum(second, floor))
    mean: NDArray[np.float32] = product / product.sum(-1, keepdims=True)
    return mean
