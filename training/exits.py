"""Calibration and confidence thresholds of a cascade's exits, fitted to validation images."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from app.model.calibration import calibrated_softmax
from app.model.card import Stage
from training import calibration

MAX_LOSS = 0.0005  # default: accuracy that early exits may cost, against the last stage for every image
CANDIDATES = 40  # quantiles of the confidence that are tried as thresholds of an exit
MIN_IMAGES = 200  # that reach a stage before it gets a calibration of its own

Array = NDArray[np.float32]
Labels = NDArray[np.int64]


def fit_exits(
    stages: Sequence[Stage],
    log_probabilities: Array,
    labels: Labels,
    costs: Sequence[float],
    max_loss: float = MAX_LOSS,
) -> list[Stage]:
    """The stages with calibrations and thresholds, for log-probabilities float32 [stages, N, classes].

    Every stage is calibrated on all images, then thresholds are chosen, then the later stages are calibrated again on
    the images that reach them. Calibration keeps the order of the classes, and so the accuracy. `costs` are relative.
    """
    fitted = [_calibrate(stage, each, labels) for stage, each in zip(stages, log_probabilities, strict=True)]
    fitted = choose_thresholds(fitted, log_probabilities, costs, max_loss)
    for index, reached in enumerate(reaching(fitted, log_probabilities)):
        if index and reached.sum() >= MIN_IMAGES:
            fitted[index] = _calibrate(fitted[index], log_probabilities[index, reached], labels[reached])
    return choose_thresholds(fitted, log_probabilities, costs, max_loss)


def choose_thresholds(
    stages: Sequence[Stage], log_probabilities: Array, costs: Sequence[float], max_loss: float = MAX_LOSS
) -> list[Stage]:
    """The thresholds with the least mean cost whose expected loss of accuracy is at most `max_loss`.

    The loss of an exit is estimated with the last stage's probabilities: that of its own class less that of the exit's
    class (cf. Jitkrittum et al. 2023, arXiv 2307.02764). It is 0 where both agree, needs no labels, and varies less
    than a difference of counted errors.
    """
    probabilities = np.stack([probabilities_of(*each) for each in zip(stages, log_probabilities, strict=True)])
    confidence, predicted, last = probabilities.max(2), probabilities.argmax(2), probabilities[-1]
    loss = last.max(1) - np.take_along_axis(last, predicted.T, 1).T  # [stages, N]
    levels = np.linspace(1, 0, CANDIDATES)
    candidates = [np.quantile(each, levels) for each in confidence[:-1]]
    _, best = _cheapest(confidence, loss, candidates, costs, np.ones(confidence.shape[1], bool), max_loss)
    return [
        stage.model_copy(update={"threshold": threshold})
        for stage, threshold in zip(stages, [*best, None], strict=True)
    ]


def reaching(stages: Sequence[Stage], log_probabilities: Array) -> NDArray[np.bool_]:
    """Which images reach each stage: bool [stages, N]."""
    left = np.ones(log_probabilities.shape[1], bool)
    reached = []
    for stage, each in zip(stages, log_probabilities, strict=True):
        reached.append(left)
        if stage.threshold is not None:
            left = left & (probabilities_of(stage, each).max(1) < np.float32(stage.threshold))
    return np.stack(reached)


def averages(stages: Sequence[Stage], views: Sequence[Array]) -> Array:
    """Of log-probabilities [views, N, classes] of each stage: the mean over the views of its `average_last` stages."""
    parts = [views[index + 1 - stage.average_last : index + 1] for index, stage in enumerate(stages)]
    return np.stack([np.concatenate(each).mean(0) for each in parts]).astype(np.float32)


def probabilities_of(stage: Stage, log_probabilities: Array) -> Array:
    """Calibrated probabilities after the stage, float32 [N, classes]."""
    return calibrated_softmax(log_probabilities, stage.temperature, stage.label_smoothing_correction)


def _cheapest(
    confidence: Array,
    loss: Array,
    candidates: Sequence[NDArray[np.floating]],
    costs: Sequence[float],
    left: NDArray[np.bool_],
    budget: float,
) -> tuple[float, list[float]]:
    """The least cost of the images that are `left` at the first of these stages, and its thresholds.

    The expected loss of their exits is at most `budget`. `candidates` of each exit descend: a lower threshold loses
    more. Without an exit within the budget, the thresholds are 1.
    """
    if not candidates:
        return costs[0] * float(left.mean()), []
    least, best = float("inf"), [1.0] * len(candidates)
    for threshold in candidates[0]:
        leaves = left & (confidence[0] >= threshold)
        lost = float(loss[0, leaves].sum()) / len(left)
        if lost > budget:
            break
        cost, others = _cheapest(confidence[1:], loss[1:], candidates[1:], costs[1:], left & ~leaves, budget - lost)
        if cost < least:
            least, best = cost, [min(1.0, float(threshold)), *others]
    return costs[0] * float(left.mean()) + least, best


def _calibrate(stage: Stage, log_probabilities: Array, labels: Labels) -> Stage:
    fit = calibration.fit_calibration(torch.from_numpy(log_probabilities), torch.from_numpy(labels))
    return stage.model_copy(update={"temperature": fit[0], "label_smoothing_correction": fit[1]})
