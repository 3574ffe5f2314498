"""Out-of-distribution score of an image: how little it resembles the training images.

The raw score is a weighted sum of two published scores of one forward pass:

- the top probability, negative (Hendrycks and Gimpel 2017, arXiv 1610.02136);
- the smallest squared Mahalanobis distance of the features to a class mean (Lee et al. 2018, arXiv 1807.03888). The
  features are the spatial means after every group of convolutions but the last. The classes share a covariance.

The score is the share of validation images with a lower raw score, from 0 to 1. The comparison with other scores is in
docs/experiments/2026-11-27-out-of-distribution.md.
"""

from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

THRESHOLD = 0.95  # of the score: 95 % of the validation images lie below it

WHITENING, MEANS = "ood.whitening", "ood.means"  # tensors: [D, D], and [classes, D] of whitened class means
TENSORS = (WHITENING, MEANS)

Array = NDArray[np.float32]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Quantile = Annotated[float, Field(allow_inf_nan=False)]


class OodCalibration(BaseModel):
    """Weights of the raw score's terms, and its quantiles on validation images."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    confidence_weight: Weight
    distance_weight: Weight
    quantiles: Annotated[
        list[Quantile],
        Field(max_length=1001, description="of the raw score, evenly spaced from 0 to 1; empty: no calibration"),
    ] = []


def is_ood(score: float | None) -> bool:
    """Whether a score is above the threshold; False without one."""
    return score is not None and score > THRESHOLD


class OodDetector:
    """`means` float32 [classes, D] are the whitened class means of a weights file. The engines whiten the features."""

    def __init__(self, calibration: OodCalibration, means: Array) -> None:
        self._calibration = calibration
        self._means = np.ascontiguousarray(-2 * means)
        self._squares = (means * means).sum(1)
        self._quantiles = np.array(calibration.quantiles)
        self._shares = np.linspace(0, 1, len(self._quantiles))

    def scores(self, probabilities: Array, whitened: Array) -> Array:
        """Scores float32 [N] of probabilities [N, classes] and features [N, D]; raw ones without quantiles."""
        confidence = probabilities.max(1)
        raw = self._calibration.distance_weight * self.squared_distances(whitened)
        raw -= self._calibration.confidence_weight * confidence
        if not len(self._quantiles):
            return raw
        scores: Array = np.interp(raw, self._quantiles, self._shares).astype(np.float32)
        return scores

    def squared_distances(self, whitened: Array) -> Array:
        """Squared Mahalanobis distance of each row to the closest class mean: float32 [N]."""
        # |z - m|^2 = |z|^2 - 2 z m + |m|^2, which needs no tensor [N, classes, D].
        # A product per image: that of all of them adds in an order that depends on their number.
        distances = (self._means @ whitened[:, :, np.newaxis])[:, :, 0]
        distances += self._squares
        nearest: Array = distances.min(1)
        nearest += np.einsum("nd,nd->n", whitened, whitened)
        return nearest
