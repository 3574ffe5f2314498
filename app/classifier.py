"""A weights file on a device, ready to classify."""

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np

from app.errors import WeightsError
from app.model.engine import Engine, Probabilities, TorchEngine
from app.model.images import Pixels
from app.model.weights import Weights

TOLERANCE = 0.05  # of a reference probability; bfloat16 moves them by up to about 0.02

logger = logging.getLogger(__name__)


class Classifier:
    """Checks on construction that the engine reproduces the file's reference probabilities; raises WeightsError."""

    def __init__(self, weights: Weights, engine: Engine, max_batch: int) -> None:
        self.weights = weights
        self.engine = engine
        self._verify()
        self._warm_up(max_batch)

    @property
    def classes(self) -> list[str]:
        return self.weights.card.classes

    @property
    def input_size(self) -> int:
        return self.weights.card.input_size

    def classify(self, pixels: Sequence[Pixels]) -> list[Probabilities]:
        """Images uint8 [S, S, 3] to probabilities float32 [classes]; raises ArithmeticError if any is not finite."""
        probabilities = self.engine(np.stack(pixels))
        if not np.isfinite(probabilities).all():
            raise ArithmeticError("the network gave probabilities that are not finite")
        return list(probabilities)

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

    def _verify(self) -> None:
        got = self.engine(self.weights.reference_images)
        worst = float(np.abs(got - self.weights.reference_probabilities).max())
        if not worst <= TOLERANCE:  # NaN fails, too
            raise WeightsError(
                f"The {self.engine.name} engine on {self.engine.device} in {self.engine.precision} misses the file's "
                f"reference probabilities by {worst:.3f}; at most {TOLERANCE} is allowed."
            )
        logger.info("reference images reproduced within %.4f", worst)

    def _warm_up(self, max_batch: int) -> None:
        """Runs the batch sizes that differ in the kernels they choose, so that no caller pays for the first pass."""
        image = self.weights.reference_images[0]
        size = 1
        while size <= max_batch:
            self.engine(np.stack([image] * size))
            size *= 2


def load(weights: Weights, device: str, threads: int, max_batch: int) -> Classifier:
    return Classifier(weights, TorchEngine(weights, device, threads), max_batch)
