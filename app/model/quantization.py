"""Rounding to int8 as the weights file and the engine do it (Jacob et al. 2018, arXiv 1712.05877)."""

from math import ceil

import numpy as np
from numpy.typing import NDArray

FILTER_LEVELS = 255  # for each output channel, even on both sides of 0
INPUT_LEVELS = 256
LEAST_INPUT = -0.17  # GELU, which comes before every convolution in int8, gives -0.16997 at least


def round_filters(filters: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Filters [out, ...] in 255 steps for each output channel, and the size of its step, [out, 1, ...]."""
    largest = np.abs(filters).max(tuple(range(1, filters.ndim)), keepdims=True)
    steps = largest / np.float32(FILTER_LEVELS // 2)
    steps[steps < np.finfo(np.float32).tiny] = 1  # nothing to tell apart, or a step too small to divide by
    return np.rint(filters / steps).astype(np.int8), steps


def input_ends(top: float) -> tuple[float, float]:
    """The least and the largest input that a convolution tells apart, both reached by whole steps from 0."""
    below = min(ceil((INPUT_LEVELS - 1) * LEAST_INPUT / (LEAST_INPUT - top)), INPUT_LEVELS - 2)
    return -below * top / (INPUT_LEVELS - 1 - below), top
