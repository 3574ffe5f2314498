"""Fits the out-of-distribution score of a network (`app.model.ood`) to its training and validation images."""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.covariance import LedoitWolf

from app import engines
from app.engines.pytorch import load_network
from app.model.networks import ConvNet
from app.model.ood import MEANS, TENSORS, WHITENING, OodCalibration
from app.model.weights import Tensors, Weights
from training.data import Split
from training.metrics import ENGINE_BATCH

MAX_IMAGES = 8000  # training images of the statistics; 2,000 change the areas under the ROC curves by 0.002
MIN_IMAGES = 100  # training and validation images each; fewer determine no 95 % quantile
DISTANCE_WEIGHT = 0.5  # standard deviations of the distance against one of the top probability
QUANTILES = 101
MIN_VARIANCE = 1e-8  # keeps the whitening within float16

Array = NDArray[np.float32]


class Statistics(NamedTuple):
    """The Gaussian of each class: a whitening of the shared covariance [D, D], and whitened class means [C, D]."""

    whitening: Array
    means: Array


def with_ood(weights: Weights, train: Split, val: Split, device: str = "auto") -> Weights:
    """A single network's weights with tensors and card of the score; unchanged where it cannot be fitted.

    That is the case for other networks than a ConvNet of two groups or more, and for fewer than MIN_IMAGES images.
    """
    network = load_network(weights)
    if not isinstance(network, ConvNet) or len(network.groups) < 2 or min(len(train), len(val)) < MIN_IMAGES:
        return weights
    sample = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))[:MAX_IMAGES]
    statistics = fit_statistics(
        _features(network, train.images[sample]), train.labels[sample].numpy(), len(weights.card.classes)
    )
    tensors: Tensors = {WHITENING: statistics.whitening.astype(np.float16), MEANS: statistics.means}

    def calibrated(calibration: OodCalibration) -> Weights:
        card = weights.card.model_copy(update={"ood": calibration})
        return weights._replace(card=card, state=weights.state | tensors)

    # Each term alone, on the engine that serves: int8 changes both.
    confidence, distance = (
        scores(calibrated(OodCalibration(confidence_weight=first, distance_weight=second)), val.images, device).std()
        for first, second in ((1, 0), (0, 1))
    )
    calibration = OodCalibration(
        confidence_weight=float(1 / max(confidence, 1e-6)), distance_weight=float(DISTANCE_WEIGHT / max(distance, 1e-6))
    )
    raw = scores(calibrated(calibration), val.images, device)
    quantiles = np.quantile(raw, np.linspace(0, 1, QUANTILES)).tolist()
    return calibrated(calibration.model_copy(update={"quantiles": quantiles}))


def without_ood(weights: Weights) -> Weights:
    """The weights without the score: in a cascade only the first network has one."""
    state = {name: value for name, value in weights.state.items() if name not in TENSORS}
    return weights._replace(card=weights.card.model_copy(update={"ood": None}), state=state)


def fit_statistics(features: Array, labels: NDArray[np.int64], classes: int) -> Statistics:
    """Class means and shared covariance of features [N, D], shrunk towards the identity (Ledoit and Wolf 2004).

    A class without images gets the mean of all.
    """
    means = np.stack(
        [features[labels == label].mean(0) if (labels == label).any() else features.mean(0) for label in range(classes)]
    )
    covariance = LedoitWolf(assume_centered=True).fit(features - means[labels]).covariance_
    variances, directions = np.linalg.eigh(covariance)
    floor = max(variances.max() * 1e-6, MIN_VARIANCE)  # dead channels have no variance
    whitening = (directions / np.sqrt(np.maximum(variances, floor))).T.astype(np.float32)
    return Statistics(whitening, (means @ whitening.T).astype(np.float32))


def scores(weights: Weights, images: torch.Tensor, device: str = "auto") -> Array:
    """Scores float32 [N] of images uint8 [N, S, S, 3] on the engine that serves; raw ones without quantiles."""
    engine = engines.load(weights, device)
    parts = [engine(np.ascontiguousarray(part.numpy())).ood for part in images.split(ENGINE_BATCH)]
    return np.concatenate([part for part in parts if part is not None])


@torch.inference_mode()
def _features(network: ConvNet, images: torch.Tensor) -> Array:
    """Spatial means float32 [N, D]."""
    parts = [network.logits_and_means(part.permute(0, 3, 1, 2))[1] for part in images.split(ENGINE_BATCH)]
    return torch.cat(parts).numpy()
