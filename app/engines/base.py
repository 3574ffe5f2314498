"""What every engine offers: uint8 images to float32 probabilities."""

from bisect import bisect_left
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray


class Output(NamedTuple):
    """Probabilities float32 [N, classes], and the stage uint8 [N] after which each image left (0 without a cascade).

    `ood` float32 [N]: out-of-distribution scores from 0 to 1; None for a file without them.
    """

    probabilities: NDArray[np.float32]
    stages: NDArray[np.uint8]
    ood: NDArray[np.float32] | None = None


class Engine(Protocol):
    """A model on a device. `streams` is the number of threads that may call it concurrently."""

    name: str
    device: str
    precision: str
    streams: int

    def __call__(self, images: NDArray[np.uint8], exclusive: bool = True) -> Output:
        """Images uint8 [N, S, S, 3] to probabilities; raises DeviceLostError if the device fails every call.

        An exclusive call may use all cores; at most one exclusive call runs at a time.
        """
        ...

    def prepare(self, sizes: Sequence[int], image: NDArray[np.uint8]) -> None:
        """Runs every batch size once with copies of an image uint8 [S, S, 3], so that no later call compiles."""
        ...

    def memory(self) -> tuple[int, int] | None:
        """(bytes used by all processes, bytes in total) of a device with its own memory, else None."""
        ...


def prepare(engine: Engine, sizes: Sequence[int], image: NDArray[np.uint8]) -> None:
    """`Engine.prepare` of a single network: all sizes, and the largest once in each stream."""
    for size in sizes:
        engine(image[None].repeat(size, 0))
    if engine.streams > 1 and sizes:
        for _ in range(engine.streams):
            engine(image[None].repeat(max(sizes), 0), exclusive=False)


def join(outputs: Sequence[Output]) -> Output:
    """The outputs of one engine's calls as one."""
    ood = [output.ood for output in outputs if output.ood is not None]
    return Output(
        np.concatenate([output.probabilities for output in outputs]),
        np.concatenate([output.stages for output in outputs]),
        np.concatenate(ood) if ood else None,
    )


def pad(images: NDArray[np.uint8], sizes: Sequence[int]) -> NDArray[np.uint8]:
    """The batch with zeros up to the next of the ascending sizes, contiguous: another size would be compiled now."""
    position = bisect_left(sizes, len(images))
    if position < len(sizes) and sizes[position] > len(images):
        padding = np.zeros((sizes[position] - len(images), *images.shape[1:]), np.uint8)
        return np.concatenate([images, padding])
    return np.ascontiguousarray(images)
