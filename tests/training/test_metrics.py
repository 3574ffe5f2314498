import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from training import calibration, metrics


def test_accuracy_and_confusion_agree() -> None:
    scores = torch.randn(500, 7, generator=torch.Generator().manual_seed(1))
    labels = torch.randint(7, (500,), generator=torch.Generator().manual_seed(2))
    table = metrics.confusion(scores, labels)
    assert table.sum() == 500
    assert table.diagonal().sum() / 500 == pytest.approx(metrics.accuracy(scores, labels))
    assert torch.equal(table.sum(1), labels.bincount(minlength=7))


def test_wilson_interval_of_a_known_case() -> None:
    low, high = metrics.wilson(0.95, 10_000)
    assert (low, high) == pytest.approx((0.94555, 0.95410), abs=1e-5)


@given(share=st.floats(0, 1), count=st.integers(1, 10**6))
def test_wilson_interval_holds_the_share(share: float, count: int) -> None:
    low, high = metrics.wilson(share, count)
    assert -1e-9 <= low <= share + 1e-9
    assert share - 1e-9 <= high <= 1 + 1e-9


def test_honest_confidence_has_no_calibration_error() -> None:
    probabilities = torch.tensor([[0.75, 0.25]] * 4)
    labels = torch.tensor([0, 0, 0, 1])
    assert metrics.calibration_error(probabilities, labels) == pytest.approx(0)


def test_boastful_confidence_has_one() -> None:
    probabilities = torch.tensor([[0.95, 0.05]] * 10)
    labels = torch.tensor([0] * 5 + [1] * 5)
    assert metrics.calibration_error(probabilities, labels) == pytest.approx(0.45)


@given(st.integers(2, 200), st.integers(0, 100))
def test_reliability_counts_every_image_once(count: int, seed: int) -> None:
    chance = torch.Generator().manual_seed(seed)
    probabilities = torch.randn(count, 4, generator=chance).mul(3).softmax(1)
    labels = torch.randint(4, (count,), generator=chance)
    assert sum(n for n, _, _ in metrics.reliability(probabilities, labels)) == count


@pytest.mark.parametrize(("temperature", "smoothing"), [(0.2, 0.0), (1.0, 0.05), (3.0, 0.15)])
def test_temperature_and_smoothing_are_found_again(temperature: float, smoothing: float) -> None:
    chance = torch.Generator().manual_seed(0)
    truth = (torch.randn(50_000, 5, generator=chance) * 4).softmax(1)
    labels = torch.multinomial(truth, 1, generator=chance).squeeze(1)
    told = (1 - smoothing) * truth + smoothing / 5
    found = calibration.fit_calibration(told.log() * temperature, labels)
    assert found == (pytest.approx(temperature, rel=0.05), pytest.approx(smoothing, abs=0.011))
