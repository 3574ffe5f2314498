"""Pure functions of (logits or probabilities, labels); nothing here prints or plots."""

from collections.abc import Callable
from functools import partial
from math import exp, log, sqrt

import torch
from torch import Tensor
from torch.nn import functional as F

from app.engines.pytorch import calibrate

SMOOTHINGS = [step / 100 for step in range(21)]  # that a calibration is chosen from


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


def fit_calibration(logits: Tensor, labels: Tensor) -> tuple[float, float]:
    """Temperature, 0.1 to 10, and smoothing, up to 0.2, with the least negative log-likelihood by `calibrate`."""

    def loss(log_temperature: float, smoothing: float) -> float:
        return F.nll_loss(calibrate(logits, exp(log_temperature), smoothing).log(), labels).item()

    found = [(_lowest(partial(loss, smoothing=s), log(0.1), log(10.0)), s) for s in SMOOTHINGS]
    log_temperature, smoothing = min(found, key=lambda pair: loss(*pair))
    return exp(log_temperature), smoothing


def _lowest(loss: Callable[[float], float], low: float, high: float) -> float:
    """Where a function with one valley between the two ends has its minimum, searched by thirds."""
    for _ in range(40):
        third = (high - low) / 3
        low, high = (low, high - third) if loss(low + third) < loss(high - third) else (low + third, high)
    return (low + high) / 2
