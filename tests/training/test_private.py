"""Private training: the accountant's values, the noise, what the file holds, and refused flags."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.optimize import brentq
from scipy.stats import norm

from app.errors import SettingsError
from app.model import weights as weights_file
from app.model.weights import BUNDLED
from training import private, train
from training.features import load_backbone
from training.private import Budget

pytest.importorskip("opacus")


def exact_epsilon(noise_multiplier: float, steps: int, delta: float) -> float:
    """Of the Gaussian mechanism (Balle & Wang 2018, arXiv 1805.06530, theorem 8), where steps add up."""
    sigma = noise_multiplier / math.sqrt(steps)

    def excess(epsilon: float) -> float:
        a, b = 1 / (2 * sigma), epsilon * sigma
        return float(norm.cdf(a - b) - math.exp(epsilon) * norm.cdf(-a - b)) - delta

    return float(brentq(excess, 0, 100))


@pytest.mark.parametrize(("noise", "steps"), [(10.0, 1), (8.18, 30), (22.2, 30), (2.0, 1)])
def test_epsilon_is_a_close_upper_bound_of_the_exact_value(noise: float, steps: int) -> None:
    exact = exact_epsilon(noise, steps, 1e-5)
    assert exact <= private.spent(noise, steps, 1e-5) <= 1.12 * exact


def test_epsilon_of_the_published_example() -> None:
    """Abadi et al. 2016, section 3.2: q = 0.01, sigma = 4, 10,000 steps, delta 1e-5 cost at most 1.26."""
    assert 0.95 < private.spent(4.0, 10_000, 1e-5, sample_rate=0.01) < 1.26


def test_plan_meets_the_request() -> None:
    for epsilon in (0.5, 3.0, 8.0):
        budget = private.plan(epsilon, None, 500)
        assert budget.delta == 1e-5
        assert 0.95 * epsilon < budget.epsilon <= epsilon
    assert private.plan(3.0, None, 1_000_000).delta == pytest.approx(1e-7)
    with pytest.raises(SettingsError, match=r"--dp-delta 0\.01 is not below 1 / 500 images"):
        private.plan(3.0, 0.01, 500)


def clusters(count: int) -> tuple[np.ndarray, torch.Tensor]:
    """Features with a large common mean and two classes, float32 [N, 16]."""
    generator = np.random.default_rng(0)
    labels = np.arange(count) % 2
    features = generator.normal(0, 1, (count, 16)) + 20
    features[:, 0] += 8 * labels - 4
    return features.astype(np.float32), torch.from_numpy(labels)


@pytest.mark.slow
def test_head_learns_and_noise_differs_between_runs() -> None:
    features, labels = clusters(2500)  # more than one physical batch
    budget = private.plan(8.0, None, len(labels))
    torch.manual_seed(0)
    first = private.train_head(features, labels, 2, features[:8], budget)
    torch.manual_seed(0)
    second = private.train_head(features, labels, 2, features[:8], budget)
    accuracy = (torch.from_numpy(features) @ first.T).argmax(1).eq(labels).float().mean()
    assert accuracy > 0.97
    assert not torch.equal(first, second)  # a seed that others know must not repeat the noise


def test_noise_has_the_planned_size() -> None:
    """Without a signal the weights are the noise of all steps: its deviation follows from the plan."""
    features, labels = np.zeros((400, 16), np.float32), torch.arange(400) % 2
    public = np.random.default_rng(0).normal(0, 1, (8, 16)).astype(np.float32)
    budget = Budget(1.0, 1e-5, 40.0)
    head = private.train_head(features, labels, 64, public, budget._replace(epsilon=100.0))
    _, scale = private.public_map(torch.from_numpy(public))
    step = private.LEARNING_RATE * budget.noise_multiplier * private.MAX_GRAD_NORM / len(labels)
    expected = step * math.sqrt(private.STEPS) / float(scale) * math.sqrt(15 / 16)  # one direction is removed
    assert float(head.std()) == pytest.approx(expected, rel=0.1)


@pytest.mark.slow
def test_file_holds_nothing_of_the_images_but_the_head(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.safetensors"
    train.main(["--data", str(folder), "--out", str(out), "--run-dir", str(tmp_path), "--dp-epsilon", "8"])
    written, backbone = weights_file.load(out), load_backbone(BUNDLED)
    card = written.card
    assert 7.5 < card.recipe["dp_epsilon"] <= 8
    assert card.recipe["dp_delta"] == 1e-5
    assert (card.temperature, card.label_smoothing_correction) == (1.0, 0.0)
    assert card.activation_ranges == backbone.card.activation_ranges
    assert np.array_equal(written.reference_images, backbone.reference_images)
    changed = [name for name, value in written.state.items() if not np.array_equal(value, backbone.state[name])]
    assert changed == ["head.weight"]
    assert (tmp_path / "report.md").exists()
    assert card.test_accuracy is not None


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--epochs", "3", "--teacher", "x"], "--dp-epsilon trains a head only, without --teacher, --epochs"),
        (["--resume"], "without --resume"),
        (
            ["--compile", "--tensorboard", "--checkpoint-interval-s", "5"],
            "without --compile, --tensorboard, --checkpoint-interval-s",
        ),
        (["--name", "my pets"], "Invalid name 'my pets'"),
        (["--initial-weights", "/missing"], "--initial-weights: there is no file /missing."),
    ],
)
def test_flags_without_effect_are_refused(
    folder: Path, capsys: pytest.CaptureFixture[str], flags: list[str], line: str
) -> None:
    with pytest.raises(SystemExit) as raised:
        train.main(["--data", str(folder), "--dp-epsilon", "3", *flags])
    assert raised.value.code == 2
    assert line in capsys.readouterr().err


def test_used_name_is_refused(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "x.safetensors"
    out.write_bytes(b"earlier")
    with pytest.raises(SystemExit) as raised:
        train.main(["--data", str(folder), "--out", str(out), "--run-dir", str(tmp_path / "run"), "--dp-epsilon", "3"])
    assert raised.value.code == 2
    assert "x.safetensors is of an earlier run" in capsys.readouterr().err
    assert out.read_bytes() == b"earlier"


@pytest.mark.parametrize(
    "flags", [["--dp-epsilon", "0"], ["--dp-epsilon", "-1"], ["--dp-epsilon", "3", "--dp-delta", "0"]]
)
def test_values_out_of_range_are_one_line(folder: Path, capsys: pytest.CaptureFixture[str], flags: list[str]) -> None:
    with pytest.raises(SystemExit):
        train.main(["--data", str(folder), *flags])
    assert "is not above 0" in capsys.readouterr().err
