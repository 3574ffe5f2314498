"""A second look, mirrored, at a picture that a lossy format has blurred, where the first leaves doubt.

Doubt is a question of one threshold; both looks count the same, as the mean of their log-probabilities.
"""

import numpy as np
from numpy.typing import NDArray

from app.model.preprocessing import Pixels

SURE = 0.7  # most labels that a second look would change have less confidence, and half as many pictures as at 0.9

LEAST = 1e-12  # takes the place of a probability rounded to 0, whose logarithm would outvote the other look


def in_doubt(probabilities: NDArray[np.float32], sure: float) -> NDArray[np.bool_]:
    """Whether no class has a probability of at least `sure`: [..., classes] to [...]."""
    doubtful: NDArray[np.bool_] = probabilities.max(-1) < sure
    return doubtful


def mirrored(pixels: Pixels) -> Pixels:
    """uint8 [S, S, 3], left and right changed over."""
    return np.ascontiguousarray(pixels[:, ::-1])


def merged(first: NDArray[np.float32], second: NDArray[np.float32]) -> NDArray[np.float32]:
    """Probabilities [..., classes] of both looks together."""
    together = np.sqrt(np.maximum(first, np.float32(LEAST))) * np.sqrt(np.maximum(second, np.float32(LEAST)))
    shares: NDArray[np.float32] = together / together.sum(-1, keepdims=True)
    return shares
