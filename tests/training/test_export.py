import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from app import engines
from app.errors import DeviceError, SettingsError, WeightsError
from app.model import weights
from app.model.ood import THRESHOLD
from tests.support.training import SMALL_RECIPE, full_disk, shades
from training import export, metrics, ood, train
from training.data import Dataset, Split

EMPTY = Split(torch.empty(0, 12, 12, 3, dtype=torch.uint8), torch.empty(0, dtype=torch.int64))
CLASSES = ["bright", "dim", "middling"]


def dataset(test: Split = EMPTY) -> Dataset:
    return Dataset("shades", CLASSES, shades(60), test, rejected=[])


@pytest.fixture(scope="module")
def network() -> nn.Module:
    return train.build_network(SMALL_RECIPE, shades(60), 3)


@pytest.mark.slow
def test_exported_file_is_served_with_the_recorded_results(tmp_path: Path, network: nn.Module) -> None:
    test, val = shades(30, seed=1), shades(60, seed=2)
    card = export.build_card("x", dataset(test), SMALL_RECIPE, network)
    _, probabilities = export.export(tmp_path / "x.safetensors", card, test, val, network, training_s=1.6)
    loaded = weights.load(tmp_path / "x.safetensors")
    assert loaded.card.results.keys() == {"training_s", "commit", "machine", "engine"} | {
        f"{split}_{name}"
        for split in ("val", "test")
        for name in ("images", "accuracy", "accuracy_interval", "calibration_error")
    }
    assert loaded.card.results["training_s"] == 2
    engine = engines.load(loaded)
    assert loaded.card.results["engine"] == f"openvino on cpu in {engine.precision}"
    assert loaded.card.activation_ranges.keys() == {f"groups.{g}.convs.{i}" for g in range(3) for i in range(2)}
    assert torch.equal(metrics.predict(engines.load(loaded), test.images), probabilities)
    assert loaded.card.test_accuracy == pytest.approx(metrics.accuracy(probabilities, test.labels), abs=1e-6)
    stored = loaded.state["groups.1.convs.1.weight"], loaded.state["whiten.weight"]
    assert [tensor.dtype for tensor in stored] == [np.int8, np.float16]
    assert np.array_equal(loaded.reference_images, val.images[:3].numpy())


@pytest.mark.slow
def test_training_images_give_an_out_of_distribution_score(tmp_path: Path, network: nn.Module) -> None:
    card = export.build_card("x", dataset(EMPTY), SMALL_RECIPE, network)
    splits = EMPTY, shades(120, seed=2)
    export.export(tmp_path / "x.safetensors", card, *splits, network, 1, train=shades(120, seed=3))
    loaded = weights.load(tmp_path / "x.safetensors")
    assert loaded.card.ood is not None
    assert (ood.scores(loaded, splits[1].images) > THRESHOLD).sum() == 6


def test_export_uses_the_given_device(tmp_path: Path, network: nn.Module) -> None:
    card = export.build_card("x", dataset(), SMALL_RECIPE, network)
    with pytest.raises(DeviceError, match="cuda:63 is not available here"):
        export.export(tmp_path / "x.safetensors", card, EMPTY, shades(45), network, 1, "cuda:63")


def test_validation_images_stand_in_without_test_images(tmp_path: Path, network: nn.Module) -> None:
    card = export.build_card("x", dataset(), SMALL_RECIPE, network)
    exported, probabilities = export.export(tmp_path / "x.safetensors", card, EMPTY, shades(45), network, 1)
    assert len(probabilities) == 45
    assert exported.card.test_accuracy is None
    assert "test_images" not in exported.card.results


def test_weights_beyond_half_precision_are_rejected(network: nn.Module) -> None:
    broken = copy.deepcopy(network)
    broken.get_submodule("groups.0.norms.0").bias.data.fill_(1e6)
    with pytest.raises(WeightsError, match="exceed half precision"):
        export.quantized_state(broken)


def test_full_disk_leaves_no_file(tmp_path: Path, network: nn.Module) -> None:
    card = export.build_card("x", dataset(), SMALL_RECIPE, network)
    with full_disk(4_000), pytest.raises(OSError, match=r"x\.safetensors cannot be written"):
        export.export(tmp_path / "x.safetensors", card, EMPTY, shades(30), network, 1)
    assert list(tmp_path.iterdir()) == []


def test_forward_cost_is_counted(network: nn.Module) -> None:
    card = export.build_card("x", dataset(), SMALL_RECIPE, network)
    # 11 x 11 outputs of 24 whitening filters of 12 weights; then 3 x 3 convolutions at 11, 5, 5, 2, 2 and 1 pixels
    channels = [(24, 11), (8, 5), (8, 5), (8, 2), (8, 2), (8, 1)]
    multiply_adds = 11**2 * 24 * 12 + sum(size**2 * 9 * width * 8 for width, size in channels) + 8 * 3
    assert card.forward_gflops == pytest.approx(2e-9 * multiply_adds, rel=1e-3)


@pytest.mark.parametrize(
    ("name", "classes", "message"),
    [
        ("my pets", CLASSES, "Invalid name 'my pets'"),
        ("x", ["", "dim"], "Invalid classes ''"),
        ("x", ["dim", "dim"], "Invalid model card: two classes have the same name"),
    ],
)
def test_card_with_invalid_fields_is_rejected(name: str, classes: list[str], message: str, network: nn.Module) -> None:
    with pytest.raises(SettingsError, match=message):
        export.build_card(name, dataset()._replace(classes=classes), SMALL_RECIPE, network)
