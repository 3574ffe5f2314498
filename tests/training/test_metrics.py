import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from training import metrics
from training.data import Split


def test_accuracy_confusion_and_recall_agree() -> None:
    scores = torch.randn(500, 4, generator=torch.Generator().manual_seed(1))
    labels = torch.randint(3, (500,), generator=torch.Generator().manual_seed(2))  # no image of the last class
    found = metrics.classification_metrics(scores.softmax(1), labels, ["a", "b", "c", "accuracy"])
    table = torch.tensor(found["confusion"])
    assert table.sum() == found["images"] == 500
    assert float(table.diagonal().sum() / 500) == pytest.approx(found["accuracy"])
    assert table.sum(1).tolist() == labels.bincount(minlength=4).tolist()
    assert found["per_class"]["b"]["recall"] == pytest.approx(float(table[1, 1] / table[1].sum()))
    assert found["per_class"]["accuracy"]["recall"] == 0
    assert json.loads(json.dumps(found)) == {**found, "interval_95": list(found["interval_95"])}


def test_wilson_interval_of_a_known_case() -> None:
    low, high = metrics.wilson_interval(9_500, 10_000)
    assert (low, high) == pytest.approx((0.94555, 0.95410), abs=1e-5)


@pytest.mark.parametrize("correct", [0, 1, 5, 10])
def test_wilson_interval_holds_the_share(correct: int) -> None:
    low, high = metrics.wilson_interval(correct, 10)
    assert 0 <= low <= correct / 10 <= high <= 1


def test_accurate_confidence_has_no_calibration_error() -> None:
    probabilities = torch.tensor([[0.75, 0.25]] * 4)
    labels = torch.tensor([0, 0, 0, 1])
    assert metrics.calibration_error(probabilities, labels) == pytest.approx(0)


def test_overconfidence_is_the_calibration_error() -> None:
    probabilities = torch.tensor([[0.95, 0.05]] * 10)
    labels = torch.tensor([0] * 5 + [1] * 5)
    assert metrics.calibration_error(probabilities, labels) == pytest.approx(0.45)


@given(st.integers(2, 200), st.integers(0, 100))
def test_reliability_counts_every_image_once(count: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    probabilities = torch.randn(count, 4, generator=generator).mul(3).softmax(1)
    labels = torch.randint(4, (count,), generator=generator)
    bins = metrics.reliability(probabilities, labels)
    assert sum(bins["count"]) == count
    assert len(bins["count"]) == len(bins["accuracy"]) == len(bins["confidence"])
    confidence = sum(n * c for n, c in zip(bins["count"], bins["confidence"], strict=True)) / count
    assert confidence == pytest.approx(float(probabilities.max(1).values.mean()), abs=1e-5)


def predict(images: Tensor) -> Tensor:
    """Probabilities from one pixel off the centre, so that every view differs."""
    pixel = images[:, 1, 2].float() / 64
    return pixel.softmax(1)


def logits(images: Tensor, row: int, column: int) -> Tensor:
    return images[:, row, column].float() / 64


@pytest.fixture
def images() -> Tensor:
    return torch.randint(0, 256, (20, 8, 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_tta_averages_logits_with_the_weights_of_airbench(images: Tensor) -> None:
    flipped = logits(images, 1, 5)
    plain = logits(images, 1, 2)
    shifted_up_left = logits(images, 2, 3), logits(images, 2, 6)
    shifted_down_right = logits(images, 0, 1), logits(images, 0, 4)
    six = 0.25 * (plain + flipped) + 0.125 * (sum(shifted_up_left) + sum(shifted_down_right))
    for view, expected in (
        (metrics.log_probs, plain),
        (metrics.flip_tta, (plain + flipped) / 2),
        (metrics.flip_translate_tta, six),
    ):
        torch.testing.assert_close(view(predict, images).softmax(1), expected.softmax(1))


def test_zero_probability_does_not_dominate_the_average(images: Tensor) -> None:
    averaged = metrics.flip_tta(lambda pixels: torch.tensor([[0.0, 1.0]]).expand(len(pixels), 2), images).softmax(1)
    assert torch.isfinite(averaged).all()


def test_robustness_table_compares_with_the_first_row(images: Tensor) -> None:
    split = Split(images, predict(images).argmax(1))
    first = metrics.evaluate("as served", predict(split.images), split.labels)
    rows = [first, *metrics.evaluate_tta(predict, split), *metrics.evaluate_lossy_formats(predict, split)]
    assert first.accuracy == 1
    assert all(row.interval_95[0] <= row.accuracy <= row.interval_95[1] + 1e-9 for row in rows)
    table = metrics.table(rows).splitlines()
    assert len(table) == 2 + 6
    assert "JPEG quality 50" in table[6]
    assert "| +0.00 points |" in table[2]
