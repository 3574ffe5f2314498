"""Folders of classes in the layouts that people have, and the lines for what is none."""

from pathlib import Path

import pytest

from app.errors import DataError
from tests.training.datasets.conftest import Writer
from training import data
from training.datasets.discovery import open_listing
from training.datasets.listing import Listing


def listing(path: Path) -> Listing:
    with open_listing(path) as found:
        return found


def counts(path: Path) -> dict[str, int]:
    return {part: len(items) for part, items in listing(path).parts.items()}


@pytest.mark.parametrize(
    ("folders", "expected"),
    [
        (["train/a", "train/b", "test/a", "test/b"], {"train": 12, "test": 12}),
        (["Train/a", "Train/b", "TEST/a"], {"train": 12, "test": 6}),
        (["train/a", "train/b", "val/a", "val/b"], {"train": 12, "val": 12}),
        (["training/a", "training/b", "valid/a", "testing/b"], {"train": 12, "val": 6, "test": 6}),
        (["train/a", "train/b", "validation/a"], {"train": 12, "val": 6}),
        (["train/a/day1", "train/a/day2", "train/b"], {"train": 18}),
        (
            ["training_set/training_set/a", "training_set/training_set/b", "test_set/test_set/a"],
            {"train": 12, "test": 6},
        ),
        (["outer/inner/a", "outer/inner/b"], {"train": 12}),
        (["valid/train/a", "valid/train/b", "valid/valid/a"], {"train": 12, "val": 6}),
        (["a", "b", "__MACOSX/a", ".git/objects"], {"train": 12}),
        (["train", "car", "bus"], {"train": 18}),
    ],
)
def test_layouts_are_recognised(tmp_path: Path, write: Writer, folders: list[str], expected: dict[str, int]) -> None:
    for name in folders:
        write(tmp_path / name)
    assert counts(tmp_path) == expected


def test_desktop_files_are_no_pictures(tmp_path: Path, write: Writer) -> None:
    for name in ("a", "b"):
        write(tmp_path / name)
        for junk in (".DS_Store", "Thumbs.db", "desktop.ini", "._0.png"):
            (tmp_path / name / junk).write_bytes(b"junk")
    assert counts(tmp_path) == {"train": 12}


def test_folder_without_pictures_is_noted(tmp_path: Path, write: Writer) -> None:
    for name in ("train/a", "train/b"):
        write(tmp_path / name)
    (tmp_path / "train" / "empty").mkdir()
    (tmp_path / "train" / "docs").mkdir()
    (tmp_path / "train" / "docs" / "readme.pdf").write_bytes(b"%PDF")
    assert listing(tmp_path).notes == ["2 folders without pictures left out: docs, empty"]


def test_links_are_followed_and_loops_end(tmp_path: Path, write: Writer) -> None:
    for name in ("a", "b"):
        write(tmp_path / "store" / name)
    target = tmp_path / "set" / "train"
    (target / "a").mkdir(parents=True)
    (target / "a" / "more").symlink_to(tmp_path / "store" / "a")
    (target / "a" / "loop").symlink_to("..")
    (target / "b").symlink_to(tmp_path / "store" / "b")
    (target / "b" / "broken.png").symlink_to("nowhere.png")
    dataset = data.load(tmp_path / "set", 16, ["train"])
    assert dataset.train.labels.bincount().tolist() == [6, 6]
    assert [reason for _, reason in dataset.rejected] == ["No such file or directory."]


@pytest.mark.parametrize(
    ("folders", "line"),
    [
        ([], "has no files; expected are train"),
        (["a"], r"has 1 folder \(a\), pictures in one folder only; expected"),
        ([""], "has 6 .png files; expected"),
        (["train", "test"], "no class folder with pictures in train/"),
        (["test/a", "test/b"], "has no training part; found: test"),
        (["train/a", "test/a", "test/b"], r"classes that the train part lacks: b\."),
    ],
)
def test_other_folders_give_one_line(tmp_path: Path, write: Writer, folders: list[str], line: str) -> None:
    for name in folders:
        write(tmp_path / name)
    with pytest.raises(DataError, match=line) as raised:
        data.load(tmp_path, 16)
    assert "--download" not in str(raised.value)
    assert "\n" not in str(raised.value)


def test_missing_path_and_unknown_file_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone does not exist\."):
        data.load(tmp_path / "gone", 16)
    (tmp_path / "x.rar").write_bytes(b"Rar!")
    with pytest.raises(DataError, match=r"x\.rar is a file of no known form; expected"):
        data.load(tmp_path / "x.rar", 16)
