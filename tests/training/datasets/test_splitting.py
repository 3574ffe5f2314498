"""A test part is held out of data that have none."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.errors import DataError
from tests.training.datasets.conftest import Writer
from training import data
from training.datasets.listing import Item, make_listing
from training.datasets.splitting import hold_out


def items(**counts: int) -> list[Item]:
    pixels = np.zeros((8, 8, 3), np.uint8)
    return [Item(f"{label}{i}", pixels, label) for label, count in counts.items() for i in range(count)]


@given(st.integers(2, 40), st.integers(2, 40), st.floats(0.05, 0.95), st.integers(0, 5))
def test_split_is_stratified_and_repeatable(a: int, b: int, fraction: float, seed: int) -> None:
    listing = make_listing("x", "flat folder", {"train": items(a=a, b=b)})
    split = hold_out(listing, fraction, seed)
    assert split == hold_out(listing, fraction, seed)
    train, test = (Counter(item.label for item in split.parts.get(part, [])) for part in ("train", "test"))
    for label, count in (("a", a), ("b", b)):
        assert train[label] + test[label] == count
        assert train[label] >= min(count, 2)  # one for training, one for validation
        assert test[label] == min(max(1, round(fraction * count)), count - 2)


def test_seed_changes_the_choice() -> None:
    listing = make_listing("x", "flat folder", {"train": items(a=30, b=30)})
    assert hold_out(listing, 0.2, 0).parts["test"] != hold_out(listing, 0.2, 1).parts["test"]


def test_data_with_other_parts_stay_as_they_are() -> None:
    for part in ("val", "test"):
        listing = make_listing("x", "image folder", {"train": items(a=5, b=5), part: items(a=5, b=5)})
        assert hold_out(listing, 0.2, 0) == listing


def test_flat_folder_is_split_and_training_can_have_all(tmp_path: Path, write: Writer) -> None:
    for name in ("a", "b"):
        write(tmp_path / name, 10)
    dataset = data.load(tmp_path, 16)
    assert (len(dataset.train), len(dataset.test)) == (16, 4)
    assert dataset.notes == [
        "flat folder without a test part: 4 of 20 pictures are held out for the test "
        "(--test-fraction 0.2, --split-seed 0)"
    ]
    assert len(data.load(tmp_path, 16, ["train"]).train) == 20
    assert len(data.load(tmp_path, 16, ["test"], data.Selection(test_fraction=1)).test) == 20
    with pytest.raises(DataError, match=r"--test-fraction 1 leaves no picture for the training\."):
        data.load(tmp_path, 16, selection=data.Selection(test_fraction=1))
    held_out = data.load(tmp_path, 16, ["test"]).test
    assert (held_out.images == dataset.test.images).all()
