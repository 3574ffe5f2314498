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
        data.load(tmp_path, 32, ["train"])
    (tmp_path / "train" / "other").mkdir()
    with pytest.raises(DataError, match="no pictures for: only, other"):
        data.load(tmp_path, 32, ["train"])
    for name in ("only", "other"):
        Image.new("RGB", (8, 8)).save(tmp_path / "train" / name / "1.png")
    with pytest.raises(DataError, match=r"test is missing; --skip-test trains without"):
        data.load(tmp_path, 32)
    (tmp_path / "test" / "only").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "test" / "only" / "1.png")
    with pytest.raises(DataError, match=r"test has no pictures for: other\."):
        data.load(tmp_path, 32)
    (tmp_path / "test" / "zebra").mkdir()
    with pytest.raises(DataError, match=r"test has classes that .*train lacks: zebra\."):
        data.load(tmp_path, 32)


def test_a_part_can_be_left_unread(folder: Path, tmp_path: Path) -> None:
    loaded = data.load(folder, 32, ["test"])
    assert (len(loaded.train), len(loaded.test)) == (0, 30)
    assert loaded.classes == ["bright", "dim", "middling"]
    (tmp_path / "train").symlink_to(folder / "train")
    loaded = data.load(tmp_path, 32, ["train"])
    assert (len(loaded.train), len(loaded.test)) == (120, 0)


def test_pictures_of_every_kind_are_read_and_others_are_named(tmp_path: Path) -> None:
    """Any size, shape and mode; what is hidden is not looked at, neither as a class nor as a picture."""
    for label in ("a", "b"):
        target = tmp_path / "train" / label / "deeper"
        target.mkdir(parents=True)
        Image.new("L", (7, 90)).save(target / "grey.png")
        Image.new("RGBA", (120, 40)).save(target / "alpha.png")
        Image.new("P", (33, 32)).save(target / "palette.gif")
        Image.new("CMYK", (64, 48)).save(target / "print.jpeg")
        Image.new("RGB", (50, 50)).save(target / "modern.webp")
        Image.effect_noise((90, 90), 50).save(target / "whole.jpg")
        (target / "cut.jpg").write_bytes((target / "whole.jpg").read_bytes()[:900])
        (target / "empty.png").touch()
        (target / ".cache").mkdir()
        Image.new("RGB", (8, 8)).save(target / ".cache" / "copy.png")
    (tmp_path / "train" / ".ipynb_checkpoints").mkdir()
    loaded = data.load(tmp_path, 32, ["train"])
    assert loaded.classes == ["a", "b"]
    assert loaded.train.labels.bincount().tolist() == [6, 6]
    assert [path.name for path, _ in loaded.rejected] == ["cut.jpg", "empty.png"] * 2


def test_a_class_whose_files_are_no_pictures_says_why(tmp_path: Path) -> None:
    for label in ("a", "b"):
        (tmp_path / "train" / label).mkdir(parents=True)
        (tmp_path / "train" / label / "scan.tiff").write_bytes(b"II*\0")
    with pytest.raises(DataError, match=r"no pictures for: a, b\. scan\.tiff was left out: Send one of PNG"):
        data.load(tmp_path, 32, ["train"])


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
