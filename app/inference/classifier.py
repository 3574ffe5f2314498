"""A weights file on an engine, ready to classify."""

from bisect import bisect_left
from collections.abc import Sequence
from heapq import nlargest
from typing import Any

import numpy as np
from numpy.typing import NDArray

from app.engines import Engine, verify_references
from app.model import tta
from app.model.preprocessing import DecodedImage, Pixels
from app.model.weights import Weights

Probabilities = NDArray[np.float32]


class Classifier:
    """Runs the network, and once more on the flipped image for a lossy one below `tta_threshold`.

    Construction runs every batch size once, the largest in each stream: no caller waits for a compilation.
    """

    def __init__(self, weights: Weights, engine: Engine, batch_sizes: Sequence[int], tta_threshold: float) -> None:
        self.weights = weights
        self.engine = engine
        self._sizes = sorted(batch_sizes)
        self._tta_threshold = tta_threshold
        for size in self._sizes:
            self._probabilities(weights.reference_images[:1].repeat(size, 0))
        if engine.streams > 1:
            for _ in range(engine.streams):
                self._probabilities(weights.reference_images[:1].repeat(self._sizes[-1], 0), exclusive=False)

    @property
    def classes(self) -> list[str]:
        return self.weights.card.classes

    @property
    def input_size(self) -> int:
        return self.weights.card.input_size

    def classify(self, images: Sequence[DecodedImage], exclusive: bool = True) -> list[Probabilities]:
        """Probabilities float32 [classes] of each image; raises ArithmeticError if any is not finite.

        `exclusive` is passed on to the engine.
        """
        pixels = np.stack([image.pixels for image in images])
        probabilities = self._probabilities(pixels, exclusive)
        lossy = np.fromiter((image.lossy for image in images), bool, len(images))
        (uncertain,) = np.nonzero(lossy & tta.is_uncertain(probabilities, self._tta_threshold))
        if len(uncertain):
            flipped = self._padded(tta.hflip(pixels[uncertain]), exclusive)
            probabilities[uncertain] = tta.geometric_mean(probabilities[uncertain], flipped)
        return list(probabilities)

    def verify(self) -> None:
        """Raises WeightsError if the engine no longer reproduces the reference outputs, or what the engine raises."""
        verify_references(self.engine, self.weights)

    def card(self) -> dict[str, Any]:
        """What `GET /model` shows: the file's card and how it is served."""
        return {
            **self.weights.card.model_dump(),
            "version": self.weights.version,
            "sha256": self.weights.sha256,
            "engine": self.engine.name,
            "device": self.engine.device,
            "precision": self.engine.precision,
        }

    def _padded(self, pixels: Pixels, exclusive: bool) -> Probabilities:
        """The probabilities of a batch of any size, which runs at the next prepared one."""
        count = len(pixels)
        size = self._sizes[bisect_left(self._sizes, count)]
        padded = np.concatenate([pixels, np.zeros((size - count, *pixels.shape[1:]), np.uint8)])
        return self._probabilities(padded, exclusive)[:count]

    def _probabilities(self, pixels: Pixels, exclusive: bool = True) -> Probabilities:
        probabilities = self.engine(pixels, exclusive)
        if not np.isfinite(probabilities).all():
            raise ArithmeticError("the network returned non-finite probabilities")
        return probabilities


def top_classes(probabilities: Probabilities, count: int, classes: list[str]) -> list[dict[str, Any]]:
    """The most probable classes, best first."""
    values = probabilities.tolist()
    best = nlargest(count, range(len(values)), values.__getitem__)
    return [{"label": classes[i], "probability": round(values[i], 4)} for i in best]
