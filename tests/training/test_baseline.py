import numpy as np
import pytest
import torch

from app import engines
from app.model.weights import Weights
from app.telemetry.drift import population_stability_index
from tests.conftest import untrained
from training.baseline import with_baseline, with_histograms
from training.data import Split

IMAGES = torch.randint(0, 256, (200, 32, 32, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
VAL = Split(IMAGES, torch.zeros(200, dtype=torch.long))


@pytest.fixture
def tiny() -> Weights:
    return untrained("tiny", 8)


def test_histograms_have_a_tenth_of_the_images_in_each_bin(tiny: Weights) -> None:
    baseline = with_baseline(tiny, engines.load(tiny), VAL).card.baseline
    assert baseline is not None
    assert baseline.images == 200
    for histogram in (baseline.confidence, baseline.brightness):
        assert histogram.shares == pytest.approx([0.1] * 10, abs=0.011)
    assert baseline.ood_score is None
    assert len(baseline.classes) == 10
    assert sum(baseline.classes) == pytest.approx(1)


def test_equal_values_share_a_bin(tiny: Weights) -> None:
    probabilities = np.zeros((200, 10), np.float32)
    probabilities[:, 3] = 1.0
    baseline = with_histograms(tiny, VAL, probabilities).card.baseline
    assert baseline is not None
    assert baseline.confidence.edges == [1.0]
    assert baseline.confidence.shares == [0.0, 1.0]
    assert baseline.classes[3] == 1.0
    assert population_stability_index(np.array(baseline.confidence.shares), 200, np.array([0, 1000])) < 0.01


def test_few_images_give_no_baseline(tiny: Weights) -> None:
    few = Split(IMAGES[:99], torch.zeros(99, dtype=torch.long))
    assert with_baseline(tiny, engines.load(tiny), few).card.baseline is None
