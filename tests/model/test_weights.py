import json
import os
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from pydantic import ValidationError
from safetensors import safe_open
from safetensors.numpy import save_file

from app.engines.pytorch import load_network
from app.errors import WeightsError
from app.model import weights
from app.model.card import ModelCard, Stage
from app.model.weights import Weights


def test_saved_weights_are_loaded(tiny_weights: Path) -> None:
    loaded = weights.load(tiny_weights)
    assert loaded.card.name == "tiny"
    assert loaded.reference_images.shape == (4, 32, 32, 3)
    assert loaded.reference_probabilities.shape == (4, 10)
    assert loaded.version == loaded.sha256[:8]
    assert not load_network(loaded).training


def test_file_with_former_field_names_keeps_its_digest(tiny_weights: Path, tmp_path: Path) -> None:
    with safe_open(tiny_weights, framework="numpy") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        card = json.loads(file.metadata()["thirtytwo"])["card"]
    card["data_set"] = card.pop("dataset")
    card["smoothing"] = card.pop("label_smoothing_correction") + 0.25
    digest = weights._digest(card, tensors)
    old = tmp_path / "old.safetensors"
    save_file(tensors, old, {"thirtytwo": json.dumps({"card": card, "digest": digest})})
    loaded = weights.load(old).card
    assert (loaded.dataset, loaded.label_smoothing_correction) == ("noise", 0.25)
    assert {"dataset", "label_smoothing_correction"} <= loaded.model_dump().keys()


def test_saving_twice_gives_the_same_file(tiny_weights: Path, tmp_path: Path) -> None:
    loaded = weights.load(tiny_weights)
    again = tmp_path / "deep" / "again.safetensors"
    weights.save(again, loaded.card, loaded.state, loaded.reference_images, loaded.reference_probabilities)
    assert weights.load(again).sha256 == loaded.sha256
    assert list(again.parent.iterdir()) == [again]


def test_saved_file_is_readable_by_all_users(tiny_weights: Path) -> None:
    assert tiny_weights.stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("shape", [(3,), (1, 1), (3, 2), (2, 1), (3, 1, 1)])
def test_scale_of_wrong_shape_is_named(tiny_weights: Path, shape: tuple[int, ...]) -> None:
    state = {"f": np.ones((3, 2), np.int8), "f.scale": np.ones(shape, np.float32)}
    for broken in (state, {"f.scale": state["f.scale"]}):
        with pytest.raises(WeightsError, match=r"f\.scale does not fit"):
            weights.load(tiny_weights)._replace(state=broken).dequantized()


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"none\.safetensors cannot be read"):
        weights.load(tmp_path / "none.safetensors")
    with pytest.raises(WeightsError, match="cannot be read"):
        weights.load(tmp_path)


@given(data=st.data())
def test_truncated_file_is_rejected(
    tiny_weights: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    content = tiny_weights.read_bytes()
    cut = tmp_path_factory.mktemp("cut") / "cut.safetensors"
    cut.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    with pytest.raises(WeightsError):
        weights.load(cut)


@given(data=st.data())
def test_altered_byte_is_rejected(
    tiny_weights: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    content = bytearray(tiny_weights.read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    content[place] ^= data.draw(st.integers(1, 255))
    altered = tmp_path_factory.mktemp("altered") / "altered.safetensors"
    altered.write_bytes(content)
    try:
        loaded = weights.load(altered)
    except WeightsError:
        return
    original = weights.load(tiny_weights)  # only white space around the header's JSON means nothing
    assert loaded.card == original.card
    assert all(np.array_equal(loaded.state[name], value) for name, value in original.state.items())


def test_pickle_is_never_executed(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, ...]:
            return (Path.touch, (tmp_path / "sprung",))

    for name in ("model.pth", "model.safetensors"):
        (tmp_path / name).write_bytes(pickle.dumps(Trap()))
        with pytest.raises(WeightsError, match=r"safetensors file|no card"):
            weights.load(tmp_path / name)
    assert not (tmp_path / "sprung").exists()


def test_foreign_safetensors_are_rejected(tmp_path: Path) -> None:
    header = json.dumps({"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    path = tmp_path / "foreign.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    with pytest.raises(WeightsError, match="no card"):
        weights.load(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architecture": "transformer"}, "architecture: Input should be 'convnet'"),
        ({"arguments": {"classes": 10, "layers": 3}}, "widths"),
        ({"arguments": {"classes": 10, "widths": [-1, 8, 8], "depth": 2}}, "greater than or equal to 1"),
        ({"arguments": {"classes": 10, "widths": [10**9, 8, 8], "depth": 2}}, "less than or equal to 4096"),
        ({"arguments": {"classes": 10, "widths": [8, 8, 8], "depth": 10**6}}, "less than or equal to 16"),
        ({"arguments": {"classes": 10, "widths": [8, 8, 8], "depth": "2"}}, "valid integer"),
        ({"arguments": {"classes": 10, "widths": [9, 8, 8], "depth": 2}}, r"match its card: groups\.0\.convs"),
        ({"arguments": {"classes": 9, "widths": [8, 8, 8], "depth": 2}}, "9 classes, the card has 10"),
        ({"classes": ["only one"]}, "at least 2 items"),
        ({"classes": ["cat"] * 10}, "same name"),
        ({"temperature": 0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"activation_ranges": {"groups.0.convs.0": float("inf")}}, "finite number"),
        ({"activation_ranges": {"nowhere": 1.0}}, "unknown layer: nowhere"),
        ({"input_size": 48}, "reference images that do not match"),
        ({"input_size": 8}, "input_size is 8, the network's is 9 to 1024"),
        (
            {"arguments": {"classes": 10, "widths": [8] * 5, "depth": 2}},
            "input_size is 32, the network's is 33 to 1024",
        ),
        ({"architecture": "lenet", "arguments": {"classes": 10}, "input_size": 33}, "the network's is 32 to 32"),
        ({"architecture": "cascade"}, "a cascade, and no other model"),
        ({"stages": [Stage(network=0)]}, "does not exist"),
    ],
)
@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")
def test_invalid_cards_are_rejected(tiny: Weights, tmp_path: Path, change: dict[str, object], message: str) -> None:
    with pytest.raises(WeightsError, match=message) as refusal:
        weights.load(write(tmp_path, tiny._replace(card=tiny.card.model_copy(update=change))))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head.weight": None}, "head.weight is missing"),
        ({"head.weight": np.zeros((10, 5), np.float16)}, "head.weight is"),
        ({"surplus": np.zeros(1, np.float16)}, "surplus is"),
        ({"whiten.bias": np.full(24, np.nan, np.float16)}, "non-finite"),
    ],
)
def test_invalid_tensors_are_rejected(tiny: Weights, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    state = {name: value for name, value in {**tiny.state, **change}.items() if value is not None}
    with pytest.raises(WeightsError, match=message):
        weights.load(write(tmp_path, tiny._replace(state=state)))


@pytest.mark.parametrize(
    "images",
    [
        np.zeros((0, 32, 32, 3), np.uint8),
        np.zeros((65, 32, 32, 3), np.uint8),
        np.zeros((4, 32, 32, 3), np.float32),
        np.zeros((3, 32, 32, 3), np.uint8),
    ],
)
def test_invalid_references_are_rejected(tiny: Weights, tmp_path: Path, images: NDArray[Any]) -> None:
    with pytest.raises(WeightsError, match="reference"):
        weights.load(write(tmp_path, tiny._replace(reference_images=images)))


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([{"network": 2}], "does not exist"),
        ([{"network": 0, "average_last": 2}], "does not exist"),
        ([{"network": 0}, {"network": 1}], "but the last has a threshold"),
        ([{"network": 0, "threshold": 1.5}, {"network": 1}], "threshold"),
    ],
)
def test_invalid_stages_are_rejected(cascade_weights: Path, stages: list[dict[str, Any]], message: str) -> None:
    card = weights.load(cascade_weights).card.model_dump(mode="json")
    with pytest.raises(ValidationError, match=message):
        ModelCard.model_validate({**card, "stages": stages})


def test_cascade_is_loaded_as_saved(cascade_weights: Path, tmp_path: Path) -> None:
    loaded = weights.load(cascade_weights)
    path = tmp_path / "again.safetensors"
    weights.save(path, *loaded[:4], loaded.reference_stages)
    assert weights.load(path).sha256 == loaded.sha256
    with pytest.raises(WeightsError, match="probabilities of stages"):
        weights.load(write(tmp_path, loaded))


def test_tensors_and_references_of_a_cascade_are_checked(cascade_weights: Path, tmp_path: Path) -> None:
    loaded, path = weights.load(cascade_weights), tmp_path / "changed.safetensors"
    surplus = {**loaded.state, "networks.2.head.weight": np.zeros(1, np.float16)}
    missing = {name: value for name, value in loaded.state.items() if name != "networks.1.head.weight"}
    other = np.roll(loaded.reference_probabilities, 1, axis=1)
    for state, probabilities, message in (
        (surplus, loaded.reference_probabilities, r"no network on its card: networks\.2\.head\.weight"),
        (missing, loaded.reference_probabilities, r"head\.weight is missing, in network 1\."),
        (loaded.state, other, "are not those of its last stage"),
    ):
        weights.save(path, loaded.card, state, loaded.reference_images, probabilities, loaded.reference_stages)
        with pytest.raises(WeightsError, match=message):
            weights.load(path)


def test_endless_files_are_rejected_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with (tmp_path / "sparse").open("wb") as sparse:
        sparse.truncate(5_000_000_000)
    for path, message in (
        (tmp_path / "fifo", "not a regular file"),
        (Path("/dev/zero"), "not a regular file"),
        (tmp_path / "sparse", "has 5000000000 bytes; at most"),
        (tmp_path / "a\nb", r"a\\nb' cannot be read"),
    ):
        with pytest.raises(WeightsError, match=message):
            weights.load(path)


@pytest.mark.parametrize(
    "header",
    [
        b"[" * 100_000,
        b'{"__metadata__": {"thirtytwo": "' + b"[" * 100_000 + b"]" * 100_000 + b'"}}',
        b"{}" + b" " * 17_000_000,
    ],
    ids=["deep header", "deep card", "long header"],
)
def test_hostile_headers_are_rejected(tmp_path: Path, header: bytes) -> None:
    path = tmp_path / "hostile.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(WeightsError):
        weights.load(path)


@pytest.fixture
def tiny(tiny_weights: Path) -> Weights:
    return weights.load(tiny_weights)


def write(folder: Path, content: Weights) -> Path:
    path = folder / "odd.safetensors"
    weights.save(path, *content[:4])
    return path


def test_exit_shares_follow_from_shares_that_reach_a_stage(tiny: Weights) -> None:
    def shares(*reaching: float | None) -> list[float]:
        stages = [Stage(network=0, share=share) for share in reaching]
        return tiny.card.model_copy(update={"stages": stages}).exit_shares()

    assert shares(1.0, 0.25, 0.125) == [0.75, 0.125, 0.125]
    assert shares(1.0, None) == []
    assert shares() == []
