"""A zip or tar file, unpacked into a folder with bounds: no path beyond it, no link, no bomb."""

import lzma
import shutil
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, NamedTuple

from app.errors import DataError
from training.datasets.folders import is_hidden

SUFFIXES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")

MAX_FILES = 2_000_000
MAX_BYTES = 64 << 30  # unpacked; ImageNet's training pictures at 64 x 64 are 13 GB
MAX_RATIO = 100  # unpacked to packed, beyond FREE_BYTES: pictures hardly shrink
FREE_BYTES = 256 << 20
CHUNK = 1 << 20

UNREADABLE = (
    zipfile.BadZipFile,
    tarfile.TarError,
    zlib.error,
    lzma.LZMAError,
    EOFError,
    OSError,
    RuntimeError,
    NotImplementedError,
)


class Member(NamedTuple):
    """A regular file of an archive."""

    name: str
    size: int
    open: Callable[[], IO[bytes] | None]


def is_archive(path: Path) -> bool:
    return path.is_file() and path.name.lower().endswith(SUFFIXES)


def unpack(archive: Path, target: Path) -> None:
    """Writes the archive's files below `target`. Raises DataError for a broken, unsafe or too large archive."""
    budget = Budget(archive, target)
    try:
        for member in _members(archive):
            place = target / _safe(member.name, archive)
            if any(map(is_hidden, PurePosixPath(member.name).parts)):
                continue
            budget.add_file()
            place.parent.mkdir(parents=True, exist_ok=True)
            stream = member.open()
            if stream is not None:
                with stream, place.open("wb") as file:
                    _copy(stream, file, budget)
    except DataError:
        raise
    except UNREADABLE as error:
        raise DataError(f"{archive.name} cannot be unpacked: {' '.join(str(error).split())[:200]}.") from error


class Budget:
    """Counts what an archive unpacks to, against MAX_FILES, MAX_BYTES, MAX_RATIO and the free disk space."""

    def __init__(self, archive: Path, target: Path, max_files: int = MAX_FILES, max_bytes: int = MAX_BYTES) -> None:
        self._archive, self._max_files = archive, max_files
        ratio_bytes = max(FREE_BYTES, MAX_RATIO * archive.stat().st_size)
        self._max_bytes = min(max_bytes, ratio_bytes, shutil.disk_usage(target).free)
        self._files = self._bytes = 0

    def add_file(self) -> None:
        self._files += 1
        if self._files > self._max_files:
            raise DataError(f"{self._archive.name} has more than {self._max_files} files.")

    def add_bytes(self, count: int) -> None:
        self._bytes += count
        if self._bytes > self._max_bytes:
            raise DataError(f"{self._archive.name} unpacks to more than {self._max_bytes} bytes, the limit here.")


def _copy(source: IO[bytes], target: IO[bytes], budget: Budget) -> None:
    # The bytes that arrive count, not the size in the header.
    while chunk := source.read(CHUNK):
        budget.add_bytes(len(chunk))
        target.write(chunk)


def _members(archive: Path) -> Iterator[Member]:
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as content:
            for info in content.infolist():
                link = (info.external_attr >> 16) & 0o170000 == 0o120000
                if not info.is_dir() and not link:
                    yield Member(info.filename, info.file_size, partial(content.open, info))
    elif not tarfile.is_tarfile(archive):
        raise DataError(f"{archive.name} is neither a zip nor a tar file, or is broken.")
    else:
        with tarfile.open(archive) as content:
            for member in content:
                if member.isreg():
                    yield Member(member.name, member.size, partial(content.extractfile, member))


def _safe(name: str, archive: Path) -> Path:
    """The name as a relative path; raises DataError where it leads out of the folder."""
    path = PurePosixPath(name.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or "\0" in name or not path.parts or ":" in path.parts[0]:
        raise DataError(f"{archive.name} has a file with an unsafe path: {name[:100]!r}.")
    return Path(path)
