"""Population stability index (PSI) of the last images against the held-out images of the weights file.

The index of two histograms p and q is the sum of (p - q) ln(p / q). By convention, 0.1 to 0.2 is a moderate and more a
large shift (Siddiqi 2006, Credit Risk Scorecards). Without drift, the index of n and m images is about (1/n + 1/m)
times chi-square with as many degrees of freedom as there are bins, less one (Yurdakul 2018, Statistical Properties of
Population Stability Index). No image is kept: it adds one to a bin of each feature.
"""

import math
from collections import deque
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from app.inference.pipeline import Prediction
from app.model.baseline import Baseline, Histogram
from app.model.card import ModelCard
from app.telemetry.metrics import Metrics

WINDOW = 10_000  # images
SLOTS = 10  # of the window; a full slot replaces the oldest
CHUNK = 100  # images that are counted at once, within 0.2 ms
Z_999 = 3.0902  # 99.9 % quantile of the normal distribution

Counts = NDArray[np.int64]
Shares = NDArray[np.float64]


def population_stability_index(shares: Shares, images: int, counts: Counts) -> float:
    """Of `counts` [bins] against the shares [bins] of so many images. An empty bin counts as half an image."""
    smallest = 0.5 / max(1, min(images, counts.sum()))
    expected = np.maximum(shares, smallest)
    actual = np.maximum(counts / max(1, counts.sum()), smallest)
    return float(((actual - expected) * np.log(actual / expected)).sum())


def critical_value(bins: int, images: int, others: int) -> float:
    """The index that one in 1,000 samples of these sizes exceeds without drift.

    The quantile of chi-square is that of Wilson and Hilferty 1931.
    """
    variance = 2 / (9 * (bins - 1))
    quantile: float = (bins - 1) * (1 - variance + Z_999 * math.sqrt(variance)) ** 3
    return quantile * (1 / images + 1 / others)


class Window:
    """Counts of the last images in the bins of one feature, by slot. `shares` [bins] are those of held-out images."""

    def __init__(self, shares: Sequence[float]) -> None:
        self.shares = np.array(shares)
        self._slots: deque[Counts] = deque([self._empty()], SLOTS)

    @property
    def counts(self) -> Counts:
        total: Counts = np.sum(self._slots, axis=0)
        return total

    def add(self, bins: NDArray[np.integer]) -> None:
        """Counts an image in each of the bins [N]."""
        self._slots[-1] += np.bincount(bins, minlength=len(self.shares))

    def start_slot(self) -> None:
        self._slots.append(self._empty())

    def _empty(self) -> Counts:
        return np.zeros(len(self.shares), np.int64)


class DriftMonitor:
    """Of one process; belongs to its event loop. The first index is exported after a tenth of the window."""

    def __init__(self, metrics: Metrics, window: int = WINDOW) -> None:
        self._metrics = metrics
        self._slot_size = window // SLOTS
        self._version = ""
        self._baseline: Baseline | None = None
        self._windows: dict[str, Window] = {}  # by feature
        self._pending: list[Prediction] = []
        self._slot_images = 0

    def start(self, version: str, card: ModelCard, early_exit: bool = True) -> None:
        """Starts an empty window for the model that serves from now on. Its file may have no baseline.

        Without early exit, a cascade has no index of stages and confidences: the histograms of its file are with it.
        """
        for name in self._windows:
            self._metrics.observe_drift(name, 0.0, 0.0)
        self._version, self._baseline = version, card.baseline
        self._windows = _windows(card, early_exit)
        self._pending, self._slot_images = [], 0

    def observe(self, version: str, images: Sequence[Prediction]) -> None:
        """Counts images that this version has classified; those of a former version are ignored."""
        if version != self._version or self._baseline is None:
            return
        self._pending += images
        if len(self._pending) >= CHUNK:
            self._count(self._baseline)

    def _count(self, baseline: Baseline) -> None:
        pending, self._pending = self._pending, []
        bins = _bins(baseline, pending)
        for name, window in self._windows.items():
            window.add(bins[name])
        self._slot_images += len(pending)
        if self._slot_images >= self._slot_size:
            self._export(baseline.images)
            self._slot_images = 0
            for window in self._windows.values():
                window.start_slot()

    def _export(self, held_out: int) -> None:
        for name, window in self._windows.items():
            counts = window.counts
            index = population_stability_index(window.shares, held_out, counts)
            critical = critical_value(len(counts), int(counts.sum()), held_out)
            self._metrics.observe_drift(name, index, critical)


def _windows(card: ModelCard, early_exit: bool) -> dict[str, Window]:
    """By feature; empty for a file without a baseline."""
    if (baseline := card.baseline) is None:
        return {}
    shares = {
        "confidence": baseline.confidence.shares,
        "brightness": baseline.brightness.shares,
        "class": baseline.classes,
        "ood_score": baseline.ood_score.shares if baseline.ood_score else [],
        "exit_stage": card.exit_shares(),
    }
    if card.stages and not early_exit:
        del shares["confidence"], shares["exit_stage"]
    return {name: Window(each) for name, each in shares.items() if len(each) > 1}  # one bin never changes


def _bins(baseline: Baseline, images: Sequence[Prediction]) -> dict[str, NDArray[np.integer]]:
    """Bin [N] of each image by feature."""
    probabilities = np.stack([image.probabilities for image in images])
    bins: dict[str, NDArray[np.integer]] = {
        "confidence": _binned(baseline.confidence, probabilities.max(1)),
        "brightness": _binned(baseline.brightness, [image.brightness for image in images]),
        "class": probabilities.argmax(1),
        "exit_stage": np.array([image.stage for image in images]),
    }
    if baseline.ood_score is not None:
        bins["ood_score"] = _binned(baseline.ood_score, [image.ood or 0.0 for image in images])
    return bins


def _binned(histogram: Histogram, values: Sequence[float] | NDArray[np.float32]) -> NDArray[np.integer]:
    bins: NDArray[np.integer] = np.searchsorted(histogram.edges, values, side="right")
    return bins
