"""Labels that a classifier contradicts which has not seen them: confident learning (Northcutt et al. 2021, 1911.00068).

The classifier is a logistic regression on frozen features, cross-validated. It finds errors that the features can see;
features from a network that was trained on the same pictures repeat the errors it has learned.
"""

import warnings
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from cleanlab.filter import find_label_issues
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

FOLDS = 5
MIN_IMAGES = 3  # of a class, that cross-validation says something about it
ITERATIONS = 100  # ranks hardly change beyond
STRENGTH = 10.0  # scikit-learn's C times the number of pictures: the penalty weighs the same for every number


class LabelError(NamedTuple):
    """Position of a picture, the class the classifier gives it, and its probability of the given label."""

    position: int
    suggested: str
    confidence: float


def find(features: NDArray[np.float32], labels: Sequence[str], seed: int = 0) -> list[LabelError]:
    """Probable label errors for features [N, D], least probable label first.

    Classes of fewer than MIN_IMAGES are left out; without two others the result is empty.
    """
    counts = Counter(labels)
    classes = sorted(name for name, count in counts.items() if count >= MIN_IMAGES)
    kept = np.array([i for i, label in enumerate(labels) if label in set(classes)], dtype=int)
    if len(classes) < 2:
        return []
    numbers = np.array([classes.index(labels[i]) for i in kept])
    probabilities = _cross_validate(features[kept], numbers, min(FOLDS, *(counts[name] for name in classes)), seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a class of which no label is confident
        order = find_label_issues(numbers, probabilities, return_indices_ranked_by="self_confidence", n_jobs=1)
    return [
        LabelError(int(kept[i]), classes[int(probabilities[i].argmax())], float(probabilities[i, numbers[i]]))
        for i in order
    ]


def _cross_validate(
    features: NDArray[np.float32], labels: NDArray[np.int64], folds: int, seed: int
) -> NDArray[np.float64]:
    """Probabilities [N, classes] for each picture from a model that was fitted without it."""
    regression = LogisticRegression(C=STRENGTH / len(labels), max_iter=ITERATIONS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        found: NDArray[np.float64] = cross_val_predict(
            make_pipeline(StandardScaler(), regression),
            features,
            labels,
            cv=StratifiedKFold(folds, shuffle=True, random_state=seed),
            method="predict_proba",
        )
    return found
