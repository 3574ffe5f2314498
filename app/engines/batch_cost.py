"""The time of a batch by its size, measured on reference images."""

from collections.abc import Callable, Sequence
from math import ceil
from time import perf_counter
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

CLOCK_S = 1e-9  # resolution of the clock; a shorter time is none


class BatchCost(NamedTuple):
    """A batch of n images takes call_s + n * image_s seconds; `largest` is the largest n."""

    call_s: float
    image_s: float
    largest: int

    @classmethod
    def fit(cls, one_s: float, largest_s: float, largest: int) -> "BatchCost":
        """From the seconds of one image and of the largest batch. Neither cost is negative, whatever the noise."""
        largest_s = max(largest_s, CLOCK_S)
        if largest == 1:
            return cls(largest_s, 0.0, 1)
        image_s = min(max(0.0, (largest_s - one_s) / (largest - 1)), largest_s / largest)
        return cls(largest_s - largest * image_s, image_s, largest)

    def seconds(self, batches: float, images: float) -> float:
        """Of so many batches with so many images together."""
        return batches * self.call_s + images * self.image_s

    @property
    def images_per_s(self) -> float:
        """In batches of the largest size."""
        return self.largest / self.seconds(1, self.largest)


def measure(
    run: Callable[[NDArray[np.uint8]], object],
    images: NDArray[np.uint8],
    largest: int,
    clock: Callable[[], float] = perf_counter,
) -> BatchCost:
    """Runs each of the images uint8 [N, S, S, 3] alone, then a batch of `largest` copies of them in turns.

    The mean over the images matters: a cascade takes longer for some of them.
    """
    ones = _seconds(run, [image[None] for image in images], clock) / len(images)
    batch = np.tile(images, (ceil(largest / len(images)), 1, 1, 1))[:largest]
    return BatchCost.fit(ones, _seconds(run, [batch], clock), largest)


def _seconds(
    run: Callable[[NDArray[np.uint8]], object], batches: Sequence[NDArray[np.uint8]], clock: Callable[[], float]
) -> float:
    start = clock()
    for batch in batches:
        run(batch)
    return clock() - start
