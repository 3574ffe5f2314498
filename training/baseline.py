"""The card's histograms of held-out images (`app.model.baseline`), which the service compares its images with."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from app.engines import Engine
from app.model.baseline import Baseline, Histogram, brightness
from app.model.weights import Weights
from training import metrics
from training.data import Split

BINS = 10
MIN_IMAGES = 100  # fewer determine no deciles

Array = NDArray[np.floating]


def with_baseline(weights: Weights, engine: Engine, val: Split) -> Weights:
    """The weights with histograms of what the engine returns for the validation images."""
    return with_histograms(weights, val, metrics.predict(engine, val.images).numpy())


def with_histograms(weights: Weights, images: Split, probabilities: Array) -> Weights:
    """The weights with histograms of these probabilities float32 [N, classes]; unchanged below MIN_IMAGES images."""
    if len(images) < MIN_IMAGES:
        return weights
    confidence, values = probabilities.max(1), brightness(images.images.numpy())
    baseline = Baseline(
        images=len(images),
        confidence=_histogram(confidence, _deciles(confidence)),
        brightness=_histogram(values, _deciles(values)),
        ood_score=_uniform() if weights.card.has_ood_score else None,
        classes=_shares(np.bincount(probabilities.argmax(1), minlength=probabilities.shape[1])),
    )
    return weights._replace(card=weights.card.model_copy(update={"baseline": baseline}))


def _uniform() -> Histogram:
    """Of the out-of-distribution score: it is a quantile on held-out images."""
    return Histogram(edges=[bin_ / BINS for bin_ in range(1, BINS)], shares=[1 / BINS] * BINS)


def _deciles(values: Array) -> list[float]:
    """Edges of bins of about a tenth of the values each; fewer bins where many values are equal."""
    return sorted({round(float(edge), 6) for edge in np.quantile(values, np.linspace(0, 1, BINS + 1)[1:-1])})


def _histogram(values: Array, edges: Sequence[float]) -> Histogram:
    counts = np.bincount(np.searchsorted(edges, values, side="right"), minlength=len(edges) + 1)
    return Histogram(edges=list(edges), shares=_shares(counts))


def _shares(counts: NDArray[np.integer]) -> list[float]:
    return [round(float(share), 6) for share in counts / counts.sum()]
