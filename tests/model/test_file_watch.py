"""Changes of the weights file, as operators and Kubernetes make them."""

import os
import shutil
from pathlib import Path

import pytest

from app.model.file_watch import FileWatch, fingerprint


@pytest.fixture
def file(tmp_path: Path) -> Path:
    file = tmp_path / "weights"
    file.write_bytes(b"old")
    return file


def changes(watch: FileWatch, calls: int = 4) -> list[bool]:
    return [watch.changed() for _ in range(calls)]


def test_an_unchanged_file_is_never_reported(file: Path) -> None:
    watch = FileWatch(file)
    file.read_bytes()
    assert changes(watch) == [False] * 4


def test_a_renamed_file_of_the_same_size_and_time_is_reported_once(file: Path) -> None:
    watch = FileWatch(file)
    other = file.with_name("other")
    other.write_bytes(b"new")
    shutil.copystat(file, other)
    other.replace(file)
    assert changes(watch) == [False, True, False, False]


def test_a_file_written_in_place_is_reported_when_complete(file: Path) -> None:
    watch = FileWatch(file)
    with file.open("wb", buffering=0) as stream:
        for _ in range(5):
            stream.write(b"part")
            assert not watch.changed()
    assert changes(watch) == [True, False, False, False]


def test_a_config_map_update_is_reported(tmp_path: Path) -> None:
    """Kubernetes writes a new folder and renames the link `..data` to it; the file is a link through `..data`."""
    for name in ("..one", "..two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights").write_text(name)
    (tmp_path / "..data").symlink_to("..one")
    (tmp_path / "weights").symlink_to("..data/weights")
    watch = FileWatch(tmp_path / "weights")
    (tmp_path / "..data_tmp").symlink_to("..two")
    os.replace(tmp_path / "..data_tmp", tmp_path / "..data")
    assert changes(watch) == [False, True, False, False]


def test_a_change_before_the_watch_is_reported(file: Path) -> None:
    """The engine process has read the file before the front end starts."""
    read = fingerprint(file)
    file.write_bytes(b"newer")
    assert changes(FileWatch(file, read)) == [False, True, False, False]
    assert changes(FileWatch(file, fingerprint(file))) == [False] * 4


def test_a_missing_file_is_no_change_until_it_is_back(file: Path) -> None:
    watch = FileWatch(file)
    file.rename(file.with_name("away"))
    assert changes(watch) == [False] * 4
    file.with_name("away").rename(file)  # its ctime is another one
    assert changes(watch) == [False, True, False, False]
