from pathlib import Path

import numpy as np
import pytest
import torch

from app import engines
from app.engines import CascadeEngine
from app.errors import DeviceError
from app.model import weights
from app.model.ood import THRESHOLD
from app.model.weights import Weights
from tests.support.training import fit, shades
from training import cascade, data, ood, train
from training.data import Split


@pytest.fixture(scope="module")
def small(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fit(folder, tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def split(folder: Path) -> Split:
    """The training images four times, with noise: enough for the statistics."""
    images = data.load(folder, 16, ["train"]).train
    generator = torch.Generator().manual_seed(0)
    noisy = [
        (images.images + torch.randint(-3, 4, images.images.shape, generator=generator)).clamp(0, 255).to(torch.uint8)
        for _ in range(4)
    ]
    return Split(torch.cat(noisy), images.labels.repeat(4))


@pytest.fixture(scope="module")
def scored(small: Path, split: Split) -> Weights:
    return ood.with_ood(weights.load(small), half(split, 0), half(split, 1))


def half(split: Split, part: int) -> Split:
    return Split(split.images[part::2], split.labels[part::2])


@pytest.mark.slow
def test_validation_images_are_in_distribution_and_noise_is_not(scored: Weights, split: Split) -> None:
    validation = ood.scores(scored, split.images[1::2])
    assert (validation > THRESHOLD).mean() == pytest.approx(0.05, abs=0.01)
    noise = torch.randint(0, 256, (50, 16, 16, 3), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    assert (ood.scores(scored, noise) > THRESHOLD).mean() > 0.9


@pytest.mark.slow
def test_engines_agree_on_the_score(scored: Weights, split: Split) -> None:
    images = split.images[:32].numpy()
    torch_scores, openvino_scores = (
        engines.load(scored, "cpu", name=name, precision="float32")(images).ood for name in ("torch", "openvino")
    )
    assert torch_scores is not None
    assert openvino_scores is not None
    assert torch_scores == pytest.approx(openvino_scores, abs=0.01)


@pytest.mark.slow
def test_scores_survive_the_file(scored: Weights, split: Split, tmp_path: Path) -> None:
    path = tmp_path / "scored.safetensors"
    weights.save(path, scored.card, scored.state, scored.reference_images, scored.reference_probabilities)
    loaded = weights.load(path)
    assert loaded.card == scored.card
    assert np.array_equal(ood.scores(loaded, split.images[:8]), ood.scores(scored, split.images[:8]))


@pytest.mark.slow
def test_first_network_of_a_cascade_scores_every_image(scored: Weights, small: Path, split: Split) -> None:
    stages = [cascade.parse_stage(text) for text in ("0", "1:flip:2")]
    composed = cascade.compose([scored, weights.load(small)], stages, "pair", split)
    engine = engines.load(composed)
    assert isinstance(engine, CascadeEngine)
    images = split.images[:40].numpy()
    first = engine._networks[0](images).ood
    assert first is not None
    assert np.array_equal(engine(images).ood, first)


def test_few_images_give_no_score(small: Path) -> None:
    loaded = weights.load(small)
    assert ood.with_ood(loaded, shades(99, 16), shades(200, 16)) is loaded


def test_scores_are_fitted_on_the_given_device(small: Path) -> None:
    with pytest.raises(DeviceError, match="tpu is not a device"):
        ood.with_ood(weights.load(small), shades(100, 16), shades(100, 16), "tpu")


def test_class_without_images_gets_the_mean_of_all() -> None:
    features = np.random.default_rng(0).normal(size=(500, 3)).astype(np.float32)
    labels = np.zeros(500, np.int64)
    statistics = ood.fit_statistics(features, labels, 2)
    assert statistics.means[0] == pytest.approx(statistics.means[1], abs=1e-5)
    whitened = (features - features.mean(0)) @ statistics.whitening.T
    assert np.cov(whitened.T, bias=True) == pytest.approx(np.eye(3), abs=0.1)


def test_constant_features_stay_within_float16() -> None:
    features = np.full((200, 4), 3.0, np.float32)
    statistics = ood.fit_statistics(features, np.zeros(200, np.int64), 2)
    assert np.isfinite(statistics.whitening.astype(np.float16)).all()
    assert np.isfinite(statistics.means).all()


@pytest.mark.slow
def test_head_on_a_network_with_a_score_can_be_loaded(folder: Path, scored: Weights, tmp_path: Path) -> None:
    start, out = tmp_path / "scored.safetensors", tmp_path / "head.safetensors"
    weights.save(start, scored.card, scored.state, scored.reference_images, scored.reference_probabilities)
    flags = ["--data", str(folder), "--run-dir", str(tmp_path / "run"), "--initial-weights", str(start)]
    train.main([*flags, "--out", str(out), "--finetune", "head", "--image-size", "16"])
    assert not weights.load(out).card.has_ood_score
