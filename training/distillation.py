"""A trained network whose answers another one learns (Hinton et al. 2015, arXiv 1503.02531).

Its answers are averages over several views: what averaging would cost in serving is paid in training.
"""

from functools import partial
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from app import engines
from app.errors import DataError
from app.model import weights
from app.model.weights import Weights
from training import metrics
from training.calibration import uncalibrated
from training.metrics import Answer, served
from training.recipe import Recipe


class Teacher(Protocol):
    @property
    def name(self) -> str: ...

    def __call__(self, index: Tensor, images: Tensor) -> Tensor:
        """Soft targets float32 [N, classes] for the training images `index`, augmented to uint8 [N, S, S, 3]."""
        ...


class Lesson(NamedTuple):
    """What was answered beforehand to every training image as it is."""

    name: str
    targets: Tensor

    def __call__(self, index: Tensor, images: Tensor) -> Tensor:
        return self.targets[index]


class Tutor(NamedTuple):
    """Answers to what the student sees, however it is augmented (Beyer et al. 2022, arXiv 2106.05237)."""

    name: str
    answer: Answer
    soften: float

    def __call__(self, index: Tensor, images: Tensor) -> Tensor:
        return (metrics.two(self.answer, images) / self.soften).softmax(1)


def engage(recipe: Recipe, classes: list[str], images: Tensor) -> Teacher | None:
    """The recipe's teacher, if any, for the training images uint8 [N, S, S, 3], on the engine that would serve it.

    Its probabilities are flattened by the power 1 / teacher_soften. Raises DataError or WeightsError.
    """
    if not recipe.teacher:
        return None
    file = Path(recipe.teacher)
    loaded = weights.load(file)
    if loaded.card.classes != classes or loaded.card.input_size != images.shape[1]:
        raise DataError(f"The teacher {file} has other classes or another input size than the student.")
    name = f"{loaded.card.name} {loaded.version}"
    if recipe.teacher_anew:
        return Tutor(name, _answer(uncalibrated(loaded)), recipe.teacher_soften)
    answer = _answer(loaded)
    parts = tqdm(images.split(1000), desc="teacher", unit="thousand", leave=False, disable=None)
    logarithms = torch.cat([metrics.six(answer, part) for part in parts])
    return Lesson(name, (logarithms / recipe.teacher_soften).softmax(1))


def _answer(loaded: Weights) -> Answer:
    return partial(served, engines.load(loaded))
