"""A weights file on an engine, ready to classify."""

import threading
from collections.abc import Sequence
from functools import cached_property
from heapq import nlargest
from itertools import repeat
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from app.engines import Engine, Output, batch_cost, verify_references
from app.engines.base import join
from app.engines.batch_cost import BatchCost
from app.engines.remote import RemoteEngine
from app.model.baseline import brightness
from app.model.ood import is_ood
from app.model.preprocessing import DecodedImage
from app.model.weights import Weights

Probabilities = NDArray[np.float32]


class Scores(NamedTuple):
    """Probabilities float32 [classes] of one image, and the stage of the cascade after which it left.

    `ood` is the out-of-distribution score from 0 to 1; None for a file without it. `brightness` is from 0 to 255.
    """

    probabilities: Probabilities
    stage: int
    ood: float | None = None
    brightness: float = 0.0


class Classifier:
    """Construction runs every batch size once: no caller waits for a compilation.

    `users` is the number of requests that are bound to this classifier; it belongs to the event loop.
    """

    def __init__(self, weights: Weights, engine: Engine, batch_sizes: Sequence[int]) -> None:
        self.weights = weights
        self.engine = engine
        self.batch_sizes = batch_sizes
        self.max_batch = max(batch_sizes)
        self.users = 0
        self._streams = threading.Semaphore(engine.streams)  # a predecessor's engine may have had more
        engine.prepare(batch_sizes, weights.reference_images[0])

    @property
    def classes(self) -> list[str]:
        return self.weights.card.classes

    @property
    def input_size(self) -> int:
        return self.weights.card.input_size

    def __call__(self, items: Sequence[DecodedImage], exclusive: bool = True) -> list[Scores]:
        """The scores of each image; raises ArithmeticError if any is not finite. `exclusive` goes to the engine."""
        images = np.stack([image.pixels for image in items])
        probabilities, stages, ood = self.run(images, exclusive)
        if not np.isfinite(probabilities).all():
            raise ArithmeticError("the network returned non-finite probabilities")
        scores = repeat(None, len(items)) if ood is None else ood.tolist()
        values = zip(probabilities, stages.tolist(), scores, brightness(images).tolist(), strict=True)
        return [Scores(*each) for each in values]

    def run(self, images: NDArray[np.uint8], exclusive: bool = True) -> Output:
        """Images uint8 [N, S, S, 3] on the engine; waits for one of its streams.

        More than the largest batch size, which another model may have allowed, take several calls.
        """
        largest = self.max_batch
        with self._streams:
            if len(images) <= largest:
                return self.engine(images, exclusive)
            parts = [images[start : start + largest] for start in range(0, len(images), largest)]
            return join([self.engine(part, exclusive) for part in parts])

    def verify(self) -> None:
        """Raises WeightsError if the engine no longer reproduces the reference outputs, or what the engine raises."""
        with self._streams:
            verify_references(self.engine, self.weights, exclusive=False)  # another batch may be running

    @cached_property
    def cost(self) -> BatchCost:
        """Measured at the first access, which blocks for several passes; by the engine process if it has the engine."""
        if isinstance(self.engine, RemoteEngine):
            return self.engine.cost
        return batch_cost.measure(self.engine, self.weights.reference_images, self.max_batch)

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


def ood_fields(score: float | None) -> dict[str, Any]:
    """The contract's `ood_score` and `ood`; empty for a file without scores."""
    return {} if score is None else {"ood_score": round(score, 4), "ood": is_ood(score)}


def top_classes(probabilities: Probabilities, count: int, classes: list[str]) -> list[dict[str, Any]]:
    """The most probable classes, best first."""
    values = probabilities.tolist()
    best = nlargest(count, range(len(values)), values.__getitem__)
    return [{"label": classes[i], "probability": round(values[i], 4)} for i in best]
