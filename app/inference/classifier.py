"""A weights file on an engine, ready to classify."""

from collections.abc import Sequence
from heapq import nlargest
from typing import Any

import numpy as np
from numpy.typing import NDArray

from app.engines import Engine
from app.model.preprocessing import Pixels
from app.model.weights import Weights


class Classifier:
    """Runs every batch size once on construction, the largest in each of several lanes: no caller pays for that."""

    def __init__(self, weights: Weights, engine: Engine, batch_sizes: Sequence[int]) -> None:
        self.weights = weights
        self.engine = engine
        for size in batch_sizes:
            self.classify([weights.reference_images[0]] * size)
        if engine.lanes > 1:
            for size in sorted(batch_sizes)[-1:] * engine.lanes:
                self.classify([weights.reference_images[0]] * size, alone=False)

    @property
    def classes(self) -> list[str]:
        return self.weights.card.classes

    @property
    def input_size(self) -> int:
        return self.weights.card.input_size

    def classify(self, pixels: Sequence[Pixels], alone: bool = True) -> list[NDArray[np.float32]]:
        """Images uint8 [S, S, 3] to probabilities float32 [classes]; raises ArithmeticError if any is not finite.

        `alone` is what the engine is told.
        """
        probabilities = self.engine(np.stack(pixels), alone)
        if not np.isfinite(probabilities).all():
            raise ArithmeticError("the network gave probabilities that are not finite")
        return list(probabilities)

    def top(self, probabilities: Sequence[float], count: int) -> list[dict[str, Any]]:
        """The likeliest classes, best first, as the contract's JSON shows them."""
        best = nlargest(count, range(len(probabilities)), probabilities.__getitem__)
        return [{"label": self.classes[i], "probability": round(probabilities[i], 4)} for i in best]

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
