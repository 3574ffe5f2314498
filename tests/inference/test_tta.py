"""Selective test-time augmentation in the classifier, with a stand-in for the engine."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from app.inference.classifier import Classifier
from app.model import tta, weights
from app.model.preprocessing import DecodedImage

LEFT = np.zeros((32, 32, 3), np.uint8)
LEFT[:, :16] = 255


class SidedEngine:
    """0.6 for class 0 if the left half is bright, 0.8 for class 1 if the right half is."""

    name, device, precision, streams = "sided", "cpu", "float32", 1

    def __init__(self) -> None:
        self.batches: list[int] = []

    def __call__(self, images: NDArray[np.uint8], exclusive: bool = True) -> NDArray[np.float32]:
        self.batches.append(len(images))
        return np.array([[0.6, 0.4] if image[0, 0, 0] else [0.2, 0.8] for image in images], np.float32)

    def memory(self) -> None:
        return None


@pytest.fixture
def engine() -> SidedEngine:
    return SidedEngine()


def classify(engine: SidedEngine, path: Path, lossy: list[bool], threshold: float) -> list[NDArray[np.float32]]:
    classifier = Classifier(weights.load(path), engine, [1, 2, 4], threshold)
    engine.batches.clear()
    return classifier.classify([DecodedImage(LEFT, None, lossy=each) for each in lossy])


def test_uncertain_lossy_images_are_averaged_with_their_flip(engine: SidedEngine, tiny_weights: Path) -> None:
    first, second, third, _ = classify(engine, tiny_weights, [True, False, True, True], 0.9)
    assert engine.batches == [4, 4]  # three flips run at the next prepared size
    assert second == pytest.approx([0.6, 0.4])
    product = np.sqrt([0.6 * 0.2, 0.4 * 0.8])
    assert first == pytest.approx(product / product.sum())
    assert third == pytest.approx(first)


@pytest.mark.parametrize(("lossy", "threshold"), [(False, 1.0), (True, 0.6), (True, 0.0)])
def test_others_run_once(engine: SidedEngine, tiny_weights: Path, lossy: bool, threshold: float) -> None:
    assert classify(engine, tiny_weights, [lossy], threshold)[0] == pytest.approx([0.6, 0.4])
    assert engine.batches == [1]


shares = st.lists(st.floats(0, 1, width=32), min_size=3, max_size=3).filter(lambda each: sum(each) > 0.1)


@given(shares, shares)
def test_geometric_mean_is_a_symmetric_distribution(one: list[float], other: list[float]) -> None:
    a, b = (np.array(each, np.float32) / np.float32(sum(each)) for each in (one, other))
    mean = tta.geometric_mean(a, b)
    assert mean.dtype == np.float32
    assert mean.sum() == pytest.approx(1, abs=1e-5)
    assert mean == pytest.approx(tta.geometric_mean(b, a))
    if a.argmax() == b.argmax() and np.sort(a)[-2] < a.max() and np.sort(b)[-2] < b.max():
        assert mean.argmax() == a.argmax()
