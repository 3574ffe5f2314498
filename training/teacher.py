"""A trained network whose answers another one learns (Hinton et al. 2015, arXiv 1503.02531).

It is asked once for every training image, and gives the average over six views of it: what averaging would cost in
serving is paid in training.
"""

from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from app.errors import DataError
from app.model import engine, weights
from training import views
from training.predict import served


class Lesson(NamedTuple):
    """Who taught, and the soft targets float32 [N, classes]."""

    teacher: str
    targets: Tensor


def teach(file: Path, classes: list[str], images: Tensor, soften: float) -> Lesson:
    """Answers to images uint8 [N, S, S, 3], flattened by the power 1 / soften, on the engine that would serve the file.

    Raises DataError or WeightsError.
    """
    loaded = weights.load(file)
    if loaded.card.classes != classes or loaded.card.input_size != images.shape[1]:
        raise DataError(f"The teacher {file} has other classes or another input size than the student.")
    answer = partial(served, engine.load(loaded))
    parts = tqdm(images.split(1000), desc="teacher", unit="thousand", leave=False, disable=None)
    logarithms = torch.cat([views.six(answer, part) for part in parts])
    return Lesson(f"{loaded.card.name} {loaded.version}", (logarithms / soften).softmax(1))
