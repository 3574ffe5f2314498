"""A linear head on frozen features: multinomial logistic regression, with cross-validated choices."""

import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score
from sklearn.model_selection import StratifiedKFold
from sklearn.utils.class_weight import compute_sample_weight
from torch.nn import functional as F

from training.features import Array, Views

FOLDS = 5  # or as many as the smallest class has images
INVERSE_PENALTIES = (0.001, 0.01, 0.1, 1.0)  # candidates of scikit-learn's C; L2, on features of unit deviation
FLIP_MIN_LOSS = 0.02  # of accuracy, besides two standard errors
MAX_ITERATIONS = 300

Labels = NDArray[np.int64]
Folds = Sequence[tuple[NDArray[np.intp], NDArray[np.intp]]]  # positions to fit to, and held out


class LinearHead(NamedTuple):
    """Logits are `features @ weight.T`, weight float32 [classes, D], without bias as ConvNet's head.

    `start_weight` [classes, D] is of a head that was fitted without the validation images: a network starts from it.
    `labels` int64 [N] are of the images. Log-probabilities float32 [N, classes] are out of fold: those of an image come
    from a head that was fitted without it. `single` and `mean` are of the images and of the mean of image and flip;
    `magnified` [2, N, classes] holds both for magnified images. `flip_loss` is the accuracy that heads fitted to images
    lose on flips.
    """

    weight: Array
    start_weight: Array
    labels: Labels
    inverse_penalty: float
    hflip: bool
    balanced: bool
    single: Array
    mean: Array
    magnified: Array
    flip_loss: float

    def log_probabilities(self) -> Array:
        """Out of fold, of the views that are served."""
        return self.mean if self.hflip else self.single


def fit(
    views: Views,
    labels: Labels,
    classes: int,
    balanced: bool,
    hflip: bool | None,
    inverse_penalty: float,
    seed: int,
    held_out: NDArray[np.bool_] | None = None,
) -> LinearHead:
    """Fits the head; `hflip` None and `inverse_penalty` 0 are chosen by cross-validation.

    Every class needs two images. `held_out` [N] selects the validation images, none by default. Flips are off where
    heads that were fitted to images classify flips worse.
    """
    scale = views.plain.std(0) + np.float32(1e-3)
    scaled = np.stack(views) / scale  # [4, N, D]
    folds = _folds(labels, seed)
    chosen = _cross_validated(scaled, False, labels, classes, folds, balanced, inverse_penalty)
    flip_loss = _flip_loss(chosen.logits, labels)
    if hflip is None:
        hflip = _is_harmless(flip_loss)
    if hflip:
        chosen = _cross_validated(scaled, True, labels, classes, folds, balanced, inverse_penalty)
    inputs = _inputs(scaled, hflip)
    weight = start_weight = _fit(inputs, labels, classes, balanced, chosen.inverse_penalty) / scale
    if held_out is not None and held_out.any():
        fitted = ~held_out
        start_weight = _fit(inputs[fitted], labels[fitted], classes, balanced, chosen.inverse_penalty) / scale
    plain, flipped, magnified, magnified_flipped = chosen.logits
    return LinearHead(
        weight=weight,
        start_weight=start_weight,
        labels=labels,
        inverse_penalty=chosen.inverse_penalty,
        hflip=hflip,
        balanced=balanced,
        single=_log_softmax(plain),
        mean=_log_softmax((plain + flipped) / 2),
        magnified=_log_softmax(np.stack([magnified, (magnified + magnified_flipped) / 2])),
        flip_loss=float(flip_loss.mean()),
    )


def balanced_accuracy(scores: Array, labels: Labels) -> float:
    """Mean recall of the classes, for scores [N, classes]."""
    return float(balanced_accuracy_score(labels, scores.argmax(1)))


class _Scores(NamedTuple):
    """Out-of-fold logits float32 [4, N, classes] of the views, and the penalty they were fitted with."""

    logits: Array
    inverse_penalty: float


def _inputs(views: Array, hflip: bool) -> Array:
    """What a head is fitted to, [N, D]: the images, or the means of images and flips."""
    inputs: Array = (views[0] + views[1]) / 2 if hflip else views[0]
    return inputs


def _cross_validated(
    views: Array, hflip: bool, labels: Labels, classes: int, folds: Folds, balanced: bool, inverse_penalty: float
) -> _Scores:
    """Scores with the penalty of the least negative log-likelihood; `views` [4, N, D]."""
    sample_weight = compute_sample_weight("balanced" if balanced else None, labels)
    inputs, fits = _inputs(views, hflip), list[tuple[float, _Scores]]()
    for candidate in (inverse_penalty,) if inverse_penalty else INVERSE_PENALTIES:
        logits = np.zeros((len(views), len(labels), classes), np.float32)
        for fitted, held_out in folds:
            weight = _fit(inputs[fitted], labels[fitted], classes, balanced, candidate)
            logits[:, held_out] = views[:, held_out] @ weight.T
        log_probabilities = _log_softmax(_inputs(logits, hflip))  # of the mean features, as the head is linear
        losses = -log_probabilities[np.arange(len(labels)), labels]
        fits.append((float(np.average(losses, weights=sample_weight)), _Scores(logits, candidate)))
    return min(fits, key=lambda fit: fit[0])[1]


def _fit(inputs: Array, labels: Labels, classes: int, balanced: bool, inverse_penalty: float) -> Array:
    """Weight float32 [classes, D]; rows of classes without images are 0."""
    weight_mode = "balanced" if balanced else None
    model = LogisticRegression(
        C=inverse_penalty, fit_intercept=False, class_weight=weight_mode, max_iter=MAX_ITERATIONS
    )
    with warnings.catch_warnings():
        # Separable classes with a weak penalty; the loss is then near 0, and further steps change nothing.
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(inputs, labels)
    weight = np.zeros((classes, inputs.shape[1]), np.float32)
    # For two classes scikit-learn has one row: the difference of the logits.
    rows = model.coef_ if len(model.classes_) > 2 else np.concatenate([-model.coef_, model.coef_]) / 2
    weight[model.classes_] = rows
    return weight


def _flip_loss(logits: Array, labels: Labels) -> Array:
    """Of each image [N]: 1 if only the image is classified correctly, -1 if only its flip is, else 0."""
    correct = logits[:2].argmax(2) == labels
    loss: Array = correct[0].astype(np.float32) - correct[1]
    return loss


def _is_harmless(flip_loss: Array) -> bool:
    """Whether the loss of accuracy is within two standard errors."""
    return bool(flip_loss.mean() <= max(FLIP_MIN_LOSS, 2 * flip_loss.std() / len(flip_loss) ** 0.5))


def _folds(labels: Labels, seed: int) -> Folds:
    count = min(FOLDS, int(np.bincount(labels)[np.unique(labels)].min()))
    return list(StratifiedKFold(count, shuffle=True, random_state=seed % 2**32).split(labels, labels))


def _log_softmax(logits: Array) -> Array:
    log_probabilities: Array = F.log_softmax(torch.from_numpy(logits), -1).numpy()
    return log_probabilities
