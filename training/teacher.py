"""A trained network whose answers another one learns (Hinton et al. 2015, arXiv 1503.02531).

Teacher and student look at the same crop of an image (Beyer et al. 2022, arXiv 2106.05237), but the teacher sees it
before it is covered or recompressed, so that the student learns to answer as if it had not been.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from app.errors import DataError
from app.model import engine, weights

CHUNK = 64  # images a pass; more are no faster


class Teacher:
    """Soft targets from a weights file, on the engine that would serve it. Raises DataError or WeightsError."""

    def __init__(self, file: Path, classes: list[str], image_size: int, soften: float, mirror: bool) -> None:
        loaded = weights.load(file)
        if loaded.card.classes != classes or loaded.card.input_size != image_size:
            raise DataError(f"The teacher {file} has other classes or another input size than the student.")
        self.title = f"{loaded.card.name} {loaded.version}"
        self._run = engine.load(loaded)
        self._soften = soften
        self._mirror = mirror

    def __call__(self, images: Tensor) -> Tensor:
        """uint8 [N, S, S, 3] to probabilities [N, classes], flattened by the power 1 / soften."""
        pixels = images.numpy()
        answers = self._answers(pixels)
        if self._mirror:
            answers = (answers + self._answers(np.ascontiguousarray(pixels[:, :, ::-1]))) / 2
        return (torch.from_numpy(answers).clamp(min=1e-6).log() / self._soften).softmax(1)

    def _answers(self, pixels: np.ndarray) -> np.ndarray:
        return np.concatenate([self._run(pixels[i : i + CHUNK]).copy() for i in range(0, len(pixels), CHUNK)])
