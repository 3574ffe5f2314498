"""Pure functions of (logits or probabilities, labels); nothing here prints or plots."""

from math import exp, log, sqrt

import torch
from torch import Tensor
from torch.nn import functional as F


def accuracy(scores: Tensor, labels: Tensor) -> float:
    """Share of rows of [N, classes] whose largest entry is the label."""
    return (scores.argmax(1) == labels).float().mean().item()


def wilson(share: float, count: int, z: float = 1.96) -> tuple[float, float]:
    """95 % score interval of a share measured on `count` trials (Wilson 1927)."""
    centre = share + z * z / (2 * count)
    spread = z * sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    scale = 1 + z * z / count
    return (centre - spread) / scale, (centre + spread) / scale


def confusion(scores: Tensor, labels: Tensor) -> Tensor:
    """int64 [classes, classes]: row is the true class, column the predicted one."""
    classes = scores.shape[1]
    return torch.bincount(labels * classes + scores.argmax(1), minlength=classes**2).view(classes, classes)


def reliability(probabilities: Tensor, labels: Tensor, bins: int = 15) -> list[tuple[int, float, float]]:
    """(count, mean confidence, accuracy) of each equal-width bin of the top probability (Guo et al. 2017)."""
    confidence, predicted = probabilities.max(1)
    index = (confidence * bins).ceil().long().clamp(1, bins) - 1
    table = []
    for i in range(bins):
        inside = index == i
        count = int(inside.sum())
        hits = (predicted == labels)[inside].double().mean().item() if count else 0.0
        table.append((count, confidence[inside].double().mean().item() if count else 0.0, hits))
    return table


def calibration_error(probabilities: Tensor, labels: Tensor, bins: int = 15) -> float:
    """Expected calibration error: mean gap of confidence and accuracy, weighted by bin size (Guo et al. 2017)."""
    return sum(n * abs(conf - hit) for n, conf, hit in reliability(probabilities, labels, bins)) / len(labels)


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """The divisor of the logits, 0.01 to 100, with the least negative log-likelihood (Guo et al. 2017).

    The likelihood is convex in the divisor's inverse, so that a search by thirds finds its minimum.
    """
    low, high = log(0.01), log(100.0)
    for _ in range(60):
        third = (high - low) / 3
        left, right = (F.cross_entropy(logits / exp(t), labels).item() for t in (low + third, high - third))
        low, high = (low, high - third) if left < right else (low + third, high)
    return exp((low + high) / 2)
