import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from app.model.ood import THRESHOLD, OodCalibration, OodDetector

CALIBRATION = OodCalibration(confidence_weight=2.0, distance_weight=0.5)


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@given(seed=st.integers(0, 1000), images=st.integers(1, 5), classes=st.integers(1, 5), features=st.integers(1, 8))
def test_distance_is_the_smallest_to_a_class_mean(seed: int, images: int, classes: int, features: int) -> None:
    means, whitened = normal(seed, classes, features), normal(seed + 1, images, features)
    expected = ((whitened[:, None] - means[None]) ** 2).sum(2).min(1)
    found = OodDetector(CALIBRATION, means).squared_distances(whitened)
    assert found == pytest.approx(expected, abs=1e-4)


@given(seed=st.integers(0, 1000), size=st.integers(1, 64), classes=st.integers(2, 40), features=st.integers(8, 256))
def test_distance_is_independent_of_the_batch(seed: int, size: int, classes: int, features: int) -> None:
    detector, whitened = OodDetector(CALIBRATION, normal(seed, classes, features)), normal(seed + 1, 64, features)
    parts = [detector.squared_distances(whitened[start : start + size]) for start in range(0, 64, size)]
    assert np.array_equal(np.concatenate(parts), detector.squared_distances(whitened))


def test_raw_score_weighs_confidence_and_distance() -> None:
    detector = OodDetector(CALIBRATION, np.zeros((2, 2), np.float32))
    raw = detector.scores(np.array([[0.9, 0.1]], np.float32), np.array([[3.0, 4.0]], np.float32))
    assert raw == pytest.approx([0.5 * 25 - 2 * 0.9])


def test_score_is_the_share_of_lower_validation_scores() -> None:
    calibration = OodCalibration(confidence_weight=0, distance_weight=1, quantiles=[0, 1, 4, 9, 16])
    detector = OodDetector(calibration, np.zeros((1, 1), np.float32))
    features = np.array([[0.0], [2.0], [3.5], [5.0]], np.float32)
    found = detector.scores(np.ones((4, 1), np.float32), features)
    assert found.dtype == np.float32
    assert found == pytest.approx([0, 0.5, 0.75 + 0.25 * (12.25 - 9) / 7, 1])


def test_five_percent_of_validation_images_exceed_the_threshold() -> None:
    raw = normal(0, 2000) ** 2
    calibration = OodCalibration(
        confidence_weight=0, distance_weight=1, quantiles=np.quantile(raw, np.linspace(0, 1, 101)).tolist()
    )
    detector = OodDetector(calibration, np.zeros((1, 1), np.float32))
    scores = detector.scores(np.ones((2000, 1), np.float32), np.sqrt(raw)[:, None])
    assert (scores > THRESHOLD).mean() == pytest.approx(0.05, abs=0.001)


@pytest.mark.parametrize(
    "change", [{"distance_weight": -1}, {"confidence_weight": float("nan")}, {"quantiles": [0] * 1002}]
)
def test_invalid_calibrations_are_rejected(change: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        OodCalibration.model_validate(CALIBRATION.model_dump() | change)
