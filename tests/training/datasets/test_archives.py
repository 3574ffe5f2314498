"""Archives are unpacked within bounds; unsafe, broken and too large ones give one line."""

import io
import tarfile
import zipfile
from pathlib import Path

import pytest

from app.errors import DataError
from tests.training.datasets.conftest import Writer
from training import data
from training.datasets import archives
from training.datasets.archives import Budget


@pytest.fixture
def folder(tmp_path: Path, write: Writer) -> Path:
    for name in ("train/a", "train/b", "test/a", "test/b"):
        write(tmp_path / "set" / name)
    return tmp_path / "set"


def test_archives_of_a_folder_are_read(folder: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "pets.zip", "w") as zipped, tarfile.open(tmp_path / "pets.tar.gz", "w:gz") as tar:
        for file in sorted(folder.rglob("*.png")):
            zipped.write(file, Path("top") / file.relative_to(folder))
            tar.add(file, str(file.relative_to(folder)))
        zipped.writestr("__MACOSX/top/train/a/._0.png", b"\0\5\x16\7")
    for name in ("pets.zip", "pets.tar.gz"):
        dataset = data.load(tmp_path / name, 16)
        assert (len(dataset.train), len(dataset.test), dataset.rejected) == (12, 12, [])


@pytest.mark.parametrize("name", ["../evil.png", "/etc/evil.png", "a/../../evil.png", "..\\evil.png", "C:\\evil.png"])
def test_unsafe_paths_are_refused(tmp_path: Path, name: str) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr(name, b"x")
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        info = tarfile.TarInfo(name)
        info.size = 1
        tar.addfile(info, io.BytesIO(b"x"))
    target = tmp_path / "target"
    target.mkdir()
    for each in ("x.zip", "x.tar"):
        with pytest.raises(DataError, match=r"x\.\w+ has a file with an unsafe path"):
            archives.unpack(tmp_path / each, target)
    assert list(target.rglob("*")) == []
    assert not list(tmp_path.rglob("evil.png"))


def test_links_and_devices_are_not_written(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for kind, name in ((tarfile.SYMTYPE, "link"), (tarfile.LNKTYPE, "hard"), (tarfile.FIFOTYPE, "pipe")):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        link = zipfile.ZipInfo("link")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, "/etc/passwd")
    target = tmp_path / "target"
    target.mkdir()
    for name in ("x.tar", "x.zip"):
        archives.unpack(tmp_path / name, target)
    assert list(target.iterdir()) == []


@pytest.mark.slow
def test_bomb_is_stopped(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.png", b"\0" * (archives.FREE_BYTES + 1))
    target = tmp_path / "target"
    target.mkdir()
    with pytest.raises(DataError, match=r"x\.zip unpacks to more than \d+ bytes"):
        archives.unpack(tmp_path / "x.zip", target)
    assert sum(file.stat().st_size for file in target.rglob("*")) <= archives.FREE_BYTES


def test_number_of_files_is_bounded(tmp_path: Path) -> None:
    (tmp_path / "x.zip").write_bytes(b"x")
    budget = Budget(tmp_path / "x.zip", tmp_path, max_files=2)
    budget.add_file()
    budget.add_file()
    with pytest.raises(DataError, match="more than 2 files"):
        budget.add_file()


@pytest.mark.parametrize("content", [b"", b"PK\3\4" + b"x" * 50, b"\x1f\x8b" + b"x" * 50])
def test_broken_archives_give_one_line(tmp_path: Path, content: bytes) -> None:
    for name in ("x.zip", "x.tar.gz"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=r"is neither a zip nor a tar file, or is broken\."):
            data.load(tmp_path / name, 16)


def test_cut_archive_gives_one_line(folder: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar.gz", "w:gz") as tar:
        tar.add(folder, "set")
    whole = (tmp_path / "x.tar.gz").read_bytes()
    (tmp_path / "x.tar.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"x\.tar\.gz cannot be unpacked"):
        data.load(tmp_path / "x.tar.gz", 16)


@pytest.mark.parametrize("name", ["x.tar.xz", "x.zip"])
def test_damaged_lzma_gives_one_line(folder: Path, tmp_path: Path, name: str) -> None:
    if name.endswith(".zip"):
        with zipfile.ZipFile(tmp_path / name, "w", zipfile.ZIP_LZMA) as zipped:
            for file in sorted(folder.rglob("*.png")):
                zipped.write(file, file.relative_to(folder))
    else:
        with tarfile.open(tmp_path / name, "w:xz") as tar:
            tar.add(folder, "set")
    damaged = bytearray((tmp_path / name).read_bytes())
    middle = len(damaged) // 2 if name.endswith(".xz") else 200
    damaged[middle : middle + 200] = b"\xff" * 200
    (tmp_path / name).write_bytes(damaged)
    with pytest.raises(DataError, match="cannot be unpacked"):
        data.load(tmp_path / name, 16)
