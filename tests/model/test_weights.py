import json
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save_file

from app.engines.pytorch import load_network
from app.errors import WeightsError
from app.model import weights


def test_what_was_saved_is_loaded(tiny_weights: Path) -> None:
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


def test_saving_again_gives_the_same_file(tiny_weights: Path, tmp_path: Path) -> None:
    loaded = weights.load(tiny_weights)
    again = tmp_path / "deep" / "again.safetensors"
    weights.save(again, loaded.card, loaded.state, loaded.reference_images, loaded.reference_probabilities)
    assert weights.load(again).sha256 == loaded.sha256
    assert list(again.parent.iterdir()) == [again]


def test_everyone_may_read_a_saved_file(tiny_weights: Path) -> None:
    assert tiny_weights.stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("shape", [(3,), (1, 1), (3, 2), (2, 1), (3, 1, 1)])
def test_scales_that_do_not_fit_are_named(tiny_weights: Path, shape: tuple[int, ...]) -> None:
    state = {"f": np.ones((3, 2), np.int8), "f.scale": np.ones(shape, np.float32)}
    for broken in (state, {"f.scale": state["f.scale"]}):
        with pytest.raises(WeightsError, match=r"f\.scale does not fit"):
            weights.load(tiny_weights)._replace(state=broken).dequantized()


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"none\.safetensors cannot be read"):
        weights.load(tmp_path / "none.safetensors")
    with pytest.raises(WeightsError, match="cannot be read"):
        weights.load(tmp_path)


@given(data=st.data())
def test_any_cut_is_noticed(tiny_weights: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    content = tiny_weights.read_bytes()
    cut = tmp_path_factory.mktemp("cut") / "cut.safetensors"
    cut.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    with pytest.raises(WeightsError):
        weights.load(cut)


@given(data=st.data())
def test_any_altered_byte_is_noticed(
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


def test_a_pickle_is_never_executed(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, ...]:
            return (Path.touch, (tmp_path / "sprung",))

    for name in ("model.pth", "model.safetensors"):
        (tmp_path / name).write_bytes(pickle.dumps(Trap()))
        with pytest.raises(WeightsError, match="not a safetensors file"):
            weights.load(tmp_path / name)
    assert not (tmp_path / "sprung").exists()


def test_foreign_safetensors_have_no_card(tmp_path: Path) -> None:
    header = json.dumps({"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    path = tmp_path / "foreign.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    with pytest.raises(WeightsError, match="no card"):
        weights.load(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architecture": "transformer"}, "architecture 'transformer' is not supported"),
        ({"arguments": {"classes": 10, "layers": 3}}, "Invalid arguments of convnet"),
        ({"arguments": {"classes": 10, "widths": [-1, 8, 8]}}, "Invalid arguments of convnet"),
        ({"arguments": {"classes": 10, "widths": [9, 8, 8]}}, "tensors do not match"),
        ({"classes": ["only one"]}, "invalid card"),
        ({"temperature": 0}, "invalid card"),
        ({"input_size": 48}, "reference images that do not match"),
    ],
)
def test_impossible_descriptions_are_refused(
    tiny_weights: Path, tmp_path: Path, change: dict[str, object], message: str
) -> None:
    loaded = weights.load(tiny_weights)
    card = loaded.card.model_copy(update=change)
    path = tmp_path / "odd.safetensors"
    weights.save(path, card, loaded.state, loaded.reference_images, loaded.reference_probabilities)
    with pytest.raises(WeightsError, match=message):
        load_network(weights.load(path))
