"""Confidence-gated test-time augmentation: the mean over an image and its horizontal flip where confidence is low.

A lossy format blurs an image; the flip recovers part of the lost accuracy at the cost of a second forward pass. Both
views have equal weight: the result is the normalised geometric mean, which is the mean of the log-probabilities.
"""

import numpy as np
from numpy.typing import NDArray

from app.model.preprocessing import Pixels

# Most labels that a flip changes have less confidence; half as many images need a second pass as with 0.9.
DEFAULT_THRESHOLD = 0.7

# Replaces a probability that was rounded to 0: its logarithm would outweigh the other view.
PROBABILITY_FLOOR = 1e-12


def is_uncertain(probabilities: NDArray[np.float32], threshold: float) -> NDArray[np.bool_]:
    """Whether the top probability is below `threshold`: float32 [..., classes] to bool [...]."""
    uncertain: NDArray[np.bool_] = probabilities.max(-1) < threshold
    return uncertain


def hflip(pixels: Pixels) -> Pixels:
    """uint8 [..., H, W, 3] with left and right exchanged, contiguous."""
    return np.ascontiguousarray(pixels[..., ::-1, :])


def geometric_mean(first: NDArray[np.float32], second: NDArray[np.float32]) -> NDArray[np.float32]:
    """Normalised geometric mean of two sets of probabilities, float32 [..., classes]."""
    floor = np.float32(PROBABILITY_FLOOR)
    product = np.sqrt(np.maximum(first, floor)) * np.sqrt(np.maximum(second, floor))
    mean: NDArray[np.float32] = product / product.sum(-1, keepdims=True)
    return mean
