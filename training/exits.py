"""Calibration and confidence thresholds of a cascade's exits, fitted to validation images."""

from collections.abc import Sequence
from itertools import product

import numpy as np
import torch
from numpy.typing import NDArray

from app.model.calibration import calibrated_softmax
from app.model.card import Stage
from training import calibration

MAX_LOSS = 0.0005  # default: accuracy that early exits may cost, against the last stage for every image
CANDIDATES = 40  # quantiles of the confidence that are tried as thresholds of an exit
MAX_COMBINATIONS = 65_000  # of thresholds: seconds; beyond three exits, each has fewer candidates
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
    exits = confidence[:-1]
    levels = np.linspace(0, 1, min(CANDIDATES, max(2, int(MAX_COMBINATIONS ** (1 / max(1, len(exits)))))))
    candidates = [np.unique(np.quantile(each, levels)) for each in exits]
    best, least = tuple(1.0 for _ in candidates), float("inf")
    for thresholds in product(*candidates):
        cost, expected = _cost_and_loss(confidence, loss, thresholds, costs)
        if expected <= max_loss and cost < least:
            best, least = tuple(min(1.0, float(threshold)) for threshold in thresholds), cost
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


def averages(stages: Sequence[Stage], singles: Sequence[Array]) -> Array:
    """Of log-probabilities [N, classes] of each stage's pass: their mean over the stage's `average_last` passes."""
    means = [np.mean(singles[i + 1 - stage.average_last : i + 1], axis=0) for i, stage in enumerate(stages)]
    return np.stack(means).astype(np.float32)


def probabilities_of(stage: Stage, log_probabilities: Array) -> Array:
    """Calibrated probabilities after the stage, float32 [N, classes]."""
    return calibrated_softmax(log_probabilities, stage.temperature, stage.label_smoothing_correction)


def _cost_and_loss(
    confidence: Array, loss: Array, thresholds: Sequence[float], costs: Sequence[float]
) -> tuple[float, float]:
    """Mean cost and mean expected loss of an image."""
    left = np.ones(confidence.shape[1], bool)
    cost, lost = 0.0, 0.0
    for stage, stage_cost in enumerate(costs):
        cost += stage_cost * float(left.mean())
        leaves = left if stage == len(thresholds) else left & (confidence[stage] >= thresholds[stage])
        lost += float(loss[stage, leaves].sum()) / len(left)
        left = left & ~leaves
    return cost, lost


def _calibrate(stage: Stage, log_probabilities: Array, labels: Labels) -> Stage:
    fit = calibration.fit_calibration(torch.from_numpy(log_probabilities), torch.from_numpy(labels))
    return stage.model_copy(update={"temperature": fit[0], "label_smoothing_correction": fit[1]})
