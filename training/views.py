"""Answers averaged over several views of each image, as Jordan 2024 (arXiv 2404.00498) does it in `infer`.

An average of log-probabilities ranks and scores the classes as one of logits does: they differ by one number a view.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from app.model import tta
from training import augment

Answer = Callable[[Tensor], Tensor]  # images uint8 [N, S, S, 3] to probabilities float32 [N, classes]


def one(answer: Answer, images: Tensor) -> Tensor:
    """Log-probabilities [N, classes] of the images as they are; so do the next two."""
    return answer(images).clamp(min=tta.PROBABILITY_FLOOR).log()


def two(answer: Answer, images: Tensor) -> Tensor:
    """The mean of an image and its mirror image."""
    return (one(answer, images) + one(answer, images.flip(2))) / 2


def doubtful(answer: Answer, images: Tensor, first: Tensor) -> Tensor:
    """Probabilities [N, classes] as served for lossy formats: of two looks where `first` is in doubt."""
    probabilities = first.clone()
    again = torch.from_numpy(tta.is_uncertain(probabilities.numpy(), tta.DEFAULT_THRESHOLD))
    if again.any():
        second = answer(images[again].flip(2))
        probabilities[again] = torch.from_numpy(tta.geometric_mean(probabilities[again].numpy(), second.numpy()))
    return probabilities


def six(answer: Answer, images: Tensor) -> Tensor:
    """One half `two`, the other half `two` of the images moved up and left, and down and right, by a pixel."""
    padded, size = augment.pad(images, 1), images.shape[1]
    moved = [padded[:, i : i + size, i : i + size] for i in (2, 0)]
    return two(answer, images) / 2 + (two(answer, moved[0]) + two(answer, moved[1])) / 4
