from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from app.errors import DataError
from training import data
from training.data import Split
from training.outputs import report_files


def test_folder_is_read_and_other_files_are_rejected(folder: Path) -> None:
    loaded = data.load(folder, 32)
    assert loaded.name == "shades"
    assert loaded.classes == ["bright", "dim", "middling"]
    assert loaded.train.images.shape == (120, 32, 32, 3)
    assert loaded.test.labels.bincount().tolist() == [10, 10, 10]
    assert [(path.name, "first bytes" in reason) for path, reason in loaded.rejected] == [("notes.txt", True)]


def test_unread_test_images_are_held_out(folder: Path) -> None:
    read = data.load(folder / "train", 16)
    unread = data.load(folder / "train", 16, unread=["test"])
    assert (len(read.test), len(unread.test)) == (24, 0)
    assert torch.equal(unread.train.images, read.train.images)
    assert unread.held_out == read.held_out == (0.2, 0)
    assert data.load(folder / "train", 16, ["train"]).held_out == data.load(folder, 16).held_out == (0.0, 0)


def test_other_test_parts_than_recorded_are_refused(folder: Path) -> None:
    dataset = data.load(folder / "train", 16)
    recipe = {"val_fraction": 0.1, "seed": 0}
    val = data.recorded_split(dataset, recipe)[1]  # a card without the record
    recorded = data.recorded_split(dataset, {**recipe, "test_fraction": 0.2, "split_seed": 0})[1]
    assert torch.equal(recorded.images, val.images)
    for was, line in (
        ((0.0, 0), "trained with no test part held out of the data; the data are read with --test-fraction 0.2"),
        ((0.2, 1), "trained with --test-fraction 0.2 --split-seed 1; the data are read with --test-fraction 0.2"),
    ):
        with pytest.raises(DataError, match=line):
            data.recorded_split(dataset, recipe, {**recipe, **dict(zip(data.HELD_OUT, was, strict=True))})


def test_labels_are_matched_by_name(folder: Path) -> None:
    loaded = data.load(folder, 16)
    loaded = loaded._replace(val=loaded.test)
    mapped = data.with_labels_of(["dim", "other", "middling", "bright"], loaded, folder)
    assert mapped.val is not None
    for part, count in ((mapped.train, 40), (mapped.val, 10), (mapped.test, 10)):
        assert part.labels.bincount().tolist() == [count, 0, count, count]
    means = [mapped.train.images[mapped.train.labels == label].float().mean() for label in (0, 2, 3)]
    assert means == sorted(means)
    with pytest.raises(DataError, match="shades has other classes than the weights: bright, middling"):
        data.with_labels_of(["dim", "other"], loaded, folder)


def test_images_are_resized(folder: Path) -> None:
    assert data.load(folder, 24).train.images.shape == (120, 24, 24, 3)


def test_parts_that_lack_classes_are_noted(tmp_path: Path) -> None:
    for part, name in (("train", "only"), ("train", "other"), ("test", "only")):
        (tmp_path / part / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / part / name / "1.png")
    assert data.load(tmp_path, 32).notes == ["the test part lacks 1 of 2 classes: other"]
    (tmp_path / "test" / "zebra").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "test" / "zebra" / "1.png")
    with pytest.raises(DataError, match=r"the test part has classes that the train part lacks: zebra\."):
        data.load(tmp_path, 32)


def test_validation_part_replaces_the_random_split(folder: Path, tmp_path: Path) -> None:
    for part, source in (("train", "train"), ("val", "test")):
        (tmp_path / part).symlink_to(folder / source)
    loaded = data.load(tmp_path, 32)
    assert loaded.val is not None
    assert (len(loaded.train), len(loaded.val), len(loaded.test)) == (120, 30, 0)
    train, val = data.training_and_validation(loaded, 0.1, seed=0)
    assert (train, val) == (loaded.train, loaded.val)
    evaluated = data.load(tmp_path, 32, ["test"])
    assert (len(evaluated.train), evaluated.val, len(evaluated.test)) == (0, None, 30)
    assert evaluated.notes == ["no test part: the validation part is read"]
    without = data.load(folder, 32)
    assert len(data.training_and_validation(without, 0.1, seed=0)[1]) == 12


def test_one_split_can_be_read_alone(folder: Path, tmp_path: Path) -> None:
    loaded = data.load(folder, 32, ["test"])
    assert (len(loaded.train), len(loaded.test)) == (0, 30)
    assert loaded.classes == ["bright", "dim", "middling"]
    (tmp_path / "train").symlink_to(folder / "train")
    loaded = data.load(tmp_path, 32, ["train"])
    assert (len(loaded.train), len(loaded.test)) == (120, 0)


def test_images_of_every_mode_and_size_are_read(tmp_path: Path) -> None:
    """Hidden files and folders are ignored, as classes and as images."""
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


def test_12_bit_values_in_16_bit_files_are_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for label, largest in (("a", 4095), ("b", 65_535)):
        (tmp_path / "train" / label).mkdir(parents=True)
        values = np.linspace(0, largest, 32 * 32).astype(np.uint16).reshape(32, 32)
        for i in range(2):
            Image.fromarray(values).save(tmp_path / "train" / label / f"{i}.png")
    loaded = data.load(tmp_path, 32, ["train"])
    assert [path.relative_to(tmp_path / "train") for path in loaded.dark_16_bit] == [Path("a/0.png"), Path("a/1.png")]
    report_files(loaded)
    (message,) = caplog.messages
    assert message.startswith("2 files of 16 bits a channel")
    assert str(loaded.dark_16_bit[0]) in message


def test_class_without_readable_images_reports_the_reason(tmp_path: Path) -> None:
    for label in ("a", "b"):
        (tmp_path / "train" / label).mkdir(parents=True)
        (tmp_path / "train" / label / "scan.tiff").write_bytes(b"II*\0")
    with pytest.raises(DataError, match=r"no readable images for: a, b\. scan\.tiff was rejected: The first bytes"):
        data.load(tmp_path, 32, ["train"])


def test_validation_split_is_stratified() -> None:
    labels = torch.tensor([0] * 100 + [1] * 60 + [2] * 2)
    images = torch.arange(162).view(-1, 1, 1, 1).expand(-1, 4, 4, 3)
    train, val = data.train_val_split(Split(images, labels), 0.1, seed=0)
    assert val.labels.bincount().tolist() == [10, 6, 1]
    numbers = torch.cat((train.images, val.images))[:, 0, 0, 0]
    assert numbers.sort().values.tolist() == list(range(162))
    again = data.train_val_split(Split(images, labels), 0.1, seed=0)[1]
    assert torch.equal(again.images, val.images)
    with pytest.raises(DataError, match="two training images"):
        data.train_val_split(Split(images[:1], labels[:1]), 0.1, seed=0)


def test_sample_is_random_and_bounded() -> None:
    split = Split(torch.arange(100).view(-1, 1, 1, 1), torch.arange(100) // 50)
    sample = split.sample(20)
    assert len(sample) == 20
    assert 4 < int(sample.labels.sum()) < 16  # of a folder sorted by class, the first 20 have one class
    assert torch.equal(sample.images, split.sample(20).images)
    assert split.sample(100) is split


def test_fingerprint_follows_images_and_labels(folder: Path) -> None:
    dataset = data.load(folder, 16)
    original = data.fingerprint(dataset)
    assert data.fingerprint(dataset) == original
    changed = dataset.train.images.clone()
    changed[0, 0, 0, 0] += 1
    for split in (Split(changed, dataset.train.labels), Split(dataset.train.images, dataset.train.labels.flip(0))):
        found = data.fingerprint(dataset._replace(train=split))
        assert {name for name in found if found[name] != original[name]} == {"content"}


def test_test_part_of_the_card_is_compared_with_that_of_the_data(folder: Path) -> None:
    dataset = data.load(folder / "train", 16)
    assert dataset.held_out == (0.2, 0)
    assert data.other_test_part(dataset, [{"test_fraction": 0.2, "split_seed": 0}, {}]) == ""
    parts = data.other_test_part(dataset, [{"test_fraction": 0.0, "split_seed": 0}])
    assert parts == "no test part held out of the data; the data are read with --test-fraction 0.2 --split-seed 0"
