"""The int8 grids that weights file and engine share (Jacob et al. 2018, arXiv 1712.05877)."""

from math import ceil

import numpy as np
from numpy.typing import NDArray

WEIGHT_LEVELS = 255  # per output channel, symmetric around 0: -127 to 127
ACTIVATION_LEVELS = 256
GELU_MIN = -0.17  # GELU precedes every int8 convolution; its minimum is -0.16997


def quantize_weights(weights: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Weights [out, ...] as int8, and the scale of each output channel, float32 [out, 1, ...]."""
    largest = np.abs(weights).max(tuple(range(1, weights.ndim)), keepdims=True)
    scale = largest / np.float32(WEIGHT_LEVELS // 2)
    scale[scale < np.finfo(np.float32).tiny] = 1  # all zero, or a scale too small to divide by
    return np.rint(weights / scale).astype(np.int8), scale


def activation_bounds(maximum: float) -> tuple[float, float]:
    """The range (low, high) of a convolution's input: high is `maximum`, low reaches GELU_MIN, 0 is on the grid."""
    negative = min(ceil((ACTIVATION_LEVELS - 1) * GELU_MIN / (GELU_MIN - maximum)), ACTIVATION_LEVELS - 2)
    return -negative * maximum / (ACTIVATION_LEVELS - 1 - negative), maximum
