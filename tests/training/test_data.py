from pathlib import Path

import pytest
import torch
from PIL import Image

from app.errors import DataError
from training import data
from training.data import Split


def test_a_folder_is_read_and_what_is_no_picture_is_reported(folder: Path) -> None:
    loaded = data.load(folder, 32)
    assert loaded.name == "shades"
    assert loaded.classes == ["bright", "dim", "middling"]
    assert loaded.train.images.shape == (120, 32, 32, 3)
    assert loaded.test.labels.bincount().tolist() == [10, 10, 10]
    assert [(path.name, "first bytes" in reason) for path, reason in loaded.rejected] == [("notes.txt", True)]


def test_pictures_are_scaled_to_the_size_asked_for(folder: Path) -> None:
    assert data.load(folder, 24).train.images.shape == (120, 24, 24, 3)


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="neither cifar-10-batches-py/ nor train"):
        data.load(tmp_path, 32)
    (tmp_path / "train" / "only").mkdir(parents=True)
    with pytest.raises(DataError, match="1 class folders; at least 2"):
        data.load(tmp_path, 32)
    (tmp_path / "train" / "other").mkdir()
    with pytest.raises(DataError, match="no pictures for: only, other"):
        data.load(tmp_path, 32)
    for name in ("only", "other"):
        Image.new("RGB", (8, 8)).save(tmp_path / "train" / name / "1.png")
    with pytest.raises(DataError, match=r"test is missing"):
        data.load(tmp_path, 32)


def test_the_holdout_takes_the_same_share_of_every_class() -> None:
    labels = torch.tensor([0] * 100 + [1] * 60 + [2] * 2)
    images = torch.arange(162).view(-1, 1, 1, 1).expand(-1, 4, 4, 3)
    rest, held = data.holdout(Split(images, labels), 0.1, seed=0)
    assert held.labels.bincount().tolist() == [10, 6, 1]
    numbers = torch.cat((rest.images, held.images))[:, 0, 0, 0]
    assert numbers.sort().values.tolist() == list(range(162))
    again = data.holdout(Split(images, labels), 0.1, seed=0)[1]
    assert torch.equal(again.images, held.images)
    with pytest.raises(DataError, match="two training pictures"):
        data.holdout(Split(images[:1], labels[:1]), 0.1, seed=0)
