import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.model.card import Stage
from training.exits import MAX_LOSS, Array, averages, choose_thresholds, fit_exits, probabilities_of, reaching

STAGES = [Stage(network=0, threshold=0.5), Stage(network=1, threshold=0.5), Stage(network=1, hflip=True)]


def outputs(seed: int, sharpness: list[float], images: int = 400) -> tuple[Array, np.ndarray]:
    """Log-probabilities [stages, N, 3] of noisy stages, the later ones less noisy; and labels."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, 3, images)
    logits = np.stack([(np.eye(3)[labels] * each) + generator.normal(0, 1, (images, 3)) for each in sharpness])
    log_probabilities = logits - np.log(np.exp(logits).sum(2, keepdims=True))
    return log_probabilities.astype(np.float32), labels


@pytest.mark.slow
@settings(max_examples=15)
@given(seed=st.integers(0, 10_000), first=st.floats(0.5, 4))
def test_thresholds_bound_the_expected_loss(seed: int, first: float) -> None:
    log_probabilities, labels = outputs(seed, [first, 4.0, 5.0])
    stages = choose_thresholds(STAGES, log_probabilities, [0.1, 1.0, 1.0])
    reached = reaching(stages, log_probabilities)
    last = probabilities_of(stages[-1], log_probabilities[-1])
    exits = reached.sum(0) - 1
    predicted = np.stack([probabilities_of(*each) for each in zip(stages, log_probabilities, strict=True)]).argmax(2)
    chosen = predicted[exits, np.arange(len(labels))]
    assert (last.max(1) - last[np.arange(len(labels)), chosen]).mean() <= MAX_LOSS + 1e-6
    assert reached[0].all()
    assert stages[-1].threshold is None


def test_confident_first_stage_saves_cost() -> None:
    log_probabilities, _ = outputs(0, [6.0, 7.0])
    stages = choose_thresholds(STAGES[:2], log_probabilities, [0.1, 1.0])
    assert reaching(stages, log_probabilities)[1].mean() < 0.5


def test_useless_first_stage_passes_almost_everything_on() -> None:
    log_probabilities, _ = outputs(0, [0.0, 7.0])
    stages = choose_thresholds(STAGES[:2], log_probabilities, [0.1, 1.0])
    assert reaching(stages, log_probabilities)[1].mean() > 0.95


def test_every_exit_is_calibrated_on_the_images_that_reach_it() -> None:
    log_probabilities, labels = outputs(1, [3.0, 4.0], images=3000)
    sharpened = log_probabilities * 3
    stages = fit_exits(STAGES[:2], sharpened, labels, [0.1, 1.0])
    reached = reaching(stages, sharpened)
    for index in range(2):
        probabilities = probabilities_of(stages[index], sharpened[index])[reached[index]]
        correct = probabilities.argmax(1) == labels[reached[index]]
        assert probabilities.max(1).mean() == pytest.approx(correct.mean(), abs=0.03)


def test_averages_cover_the_last_stages() -> None:
    singles = [np.full((2, 3), value, np.float32) for value in (1, 2, 6)]
    stages = [Stage(network=0), Stage(network=0), Stage(network=0, average_last=2)]
    assert averages(stages, singles)[:, 0, 0].tolist() == [1, 2, 4]


def test_the_search_is_bounded_for_many_exits() -> None:
    """40 candidates for each of 15 exits would not end."""
    log_probabilities, _ = outputs(0, [float(each) for each in range(1, 17)], images=50)
    stages = choose_thresholds([Stage(network=0)] * 16, log_probabilities, [1.0] * 16, max_loss=0.2)
    assert [stage.threshold is None for stage in stages] == [False] * 15 + [True]
