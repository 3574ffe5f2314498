"""Targets from a trained network for another one to learn (Hinton et al. 2015, arXiv 1503.02531).

The targets average several views of an image: training computes the test-time augmentation, so that serving needs none.
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
from training.metrics import PredictFn
from training.recipe import Recipe


class Teacher(Protocol):
    """`name` identifies the teacher's weights file on the student's card."""

    @property
    def name(self) -> str: ...

    def __call__(self, index: Tensor, images: Tensor) -> Tensor:
        """Soft targets float32 [N, classes] for training images `index` int64 [N], augmented to uint8 [N, S, S, 3]."""
        ...


class CachedTeacher(NamedTuple):
    """Targets float32 [images, classes], computed once on the training images without augmentation."""

    name: str
    targets: Tensor

    def __call__(self, index: Tensor, images: Tensor) -> Tensor:
        return self.targets[index]  # of the clean image: augmentation must not change the class


class OnlineTeacher(NamedTuple):
    """Targets for each augmented image: both networks see the same pixels (Beyer et al. 2022, arXiv 2106.05237)."""

    name: str
    predict: PredictFn
    temperature: float

    def __call__(self, index: Tensor, images: Tensor) -> Tensor:
        # Two views, not six: this runs in every step.
        return (metrics.flip_tta(self.predict, images) / self.temperature).softmax(1)


def load_teacher(recipe: Recipe, classes: list[str], images: Tensor, device: str = "auto") -> Teacher | None:
    """The recipe's teacher, if any, for training images uint8 [N, S, S, 3], on the engine that would serve it there.

    Raises WeightsError, or DataError where classes or input size differ from the student's.
    """
    if not recipe.teacher:
        return None
    file = Path(recipe.teacher)
    loaded = weights.load(file)
    if loaded.card.classes != classes or loaded.card.input_size != images.shape[1]:
        raise DataError(f"The teacher {file} has other classes or another input size than the student.")
    name = f"{loaded.card.name} {loaded.version}"
    if recipe.online_teacher:
        # Mixup images are outside of the data that calibration was fitted on, so its sharpening does not apply. A
        # cascade keeps it: its thresholds are of calibrated confidences.
        raw = loaded if loaded.card.stages else uncalibrated(loaded)
        return OnlineTeacher(name, _predict_fn(raw, device), recipe.distill_temperature)
    predict = _predict_fn(loaded, device)
    # Chunks bound the memory of the six views, and move the progress bar.
    chunks = tqdm(images.split(1000), desc="teacher", unit="thousand", leave=False, disable=None)
    log_probs = torch.cat([metrics.flip_translate_tta(predict, chunk) for chunk in chunks])
    # Dividing log-probabilities is dividing logits: softmax ignores their common offset.
    return CachedTeacher(name, (log_probs / recipe.distill_temperature).softmax(1))


def _predict_fn(loaded: Weights, device: str) -> PredictFn:
    return partial(metrics.predict, engines.load(loaded, device))
