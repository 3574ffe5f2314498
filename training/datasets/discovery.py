"""Which form a path has, and its listing."""

import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from app.errors import DataError
from training.datasets import archives, arrays, cifar, folders, parquet, tables, vision
from training.datasets.listing import Listing, plural, shortened

EXPECTED = (
    "expected are train/<class>/ and test/<class>/ folders, <class>/ folders, a CSV of path and label, an .npz, "
    "parquet, a zip of these, or a torchvision folder"
)

MAX_DEPTH = 3  # folders around the data, as in an archive of a folder


@contextmanager
def open_listing(path: Path, name: str = "") -> Iterator[Listing]:
    """The pictures and labels at a path: of the torchvision set `name`, or of the form that is found there.

    Sources of an archive exist within the context only. Raises DataError, one line with what was found and expected.
    """
    if name:
        yield vision.read(name, path)
    elif not path.exists():
        raise DataError(f"{path} does not exist.")
    elif archives.is_archive(path):
        with tempfile.TemporaryDirectory(prefix="thirtytwo-") as folder:
            archives.unpack(path, Path(folder))
            stem = path.name[: -len(next(s for s in archives.SUFFIXES if path.name.lower().endswith(s)))]
            listing = _find(Path(folder), unpacked=True)
            # An archive's data set has the name of the archive, not of the temporary folder.
            yield listing._replace(name=stem if listing.name == Path(folder).resolve().name else listing.name)
    else:
        yield _find(path, unpacked=False)


def _find(path: Path, unpacked: bool) -> Listing:
    if path.is_dir():
        try:
            listing = _read_folder(path, unpacked, MAX_DEPTH)
        except PermissionError as error:
            raise DataError(f"{error.filename} cannot be read: {error.strerror}.") from error
        if listing is None:
            found = tables.complaint(path, unpacked) or f"{_shown(path, unpacked)} has {_content(path)}; {EXPECTED}."
            raise DataError(found)
        return listing
    listing = _read_file(path)
    if listing is None:
        raise DataError(f"{path} is a file of no known form; {EXPECTED}.")
    return listing


def _read_file(path: Path, inside: bool = False) -> Listing | None:
    suffix = path.suffix.lower()
    if suffix == ".npz":
        return arrays.read(path)
    if suffix in parquet.SUFFIXES:
        return parquet.read(path)
    if suffix in (".csv", ".tsv"):
        listing = tables.read(path, inside)
        if listing is None:
            raise DataError(tables.complaint(path, inside) or f"{path.name} has no column of files that exist.")
        return listing
    return None


def _read_folder(folder: Path, unpacked: bool, depth: int) -> Listing | None:
    """The first form that the folder has, from the most specific to the least."""
    name = vision.recognise(folder)
    return (
        cifar.read(folder)
        or (vision.read(name, folder) if name else None)
        or folders.read_parts(folder)
        or tables.read(folder, inside=unpacked)
        or (parquet.read(folder) if parquet.files_in(folder) else None)
        or folders.read_flat(folder)
        or _read_single(folder, unpacked, depth)
    )


def _read_single(folder: Path, unpacked: bool, depth: int) -> Listing | None:
    """The listing of the only .npz in the folder, or of the only folder of a known form in it."""
    files = [path for path in sorted(folder.iterdir()) if path.is_file() and path.suffix.lower() == ".npz"]
    if len(files) == 1:
        return arrays.read(files[0])
    if files:
        raise DataError(f"{folder} has several .npz files ({shortened(f.name for f in files)}); name one with --data.")
    inner = folders.subfolders(folder)
    if depth == 0 or len(inner) != 1:
        return None
    listing = _read_folder(inner[0], unpacked, depth - 1)
    if listing is None:
        return None
    return listing._replace(notes=[*listing.notes, f"read from the subfolder {inner[0].name}"])


def _content(folder: Path) -> str:
    """`3 folders (a, b, c), 12 .txt files` of the entries that are not hidden."""
    entries = [path for path in folder.iterdir() if not folders.is_hidden(path.name)]
    inner = sorted(path.name for path in entries if path.is_dir())
    suffixes = Counter(path.suffix.lower() for path in entries if path.is_file())
    found = [f"{plural(len(inner), 'folder')} ({shortened(inner)})"] if inner else []
    found += [f"{plural(count, f'{suffix} file' if suffix else 'file')}" for suffix, count in suffixes.most_common(4)]
    classes = sum(folders.is_class(folder / name) for name in inner)
    found += ["pictures in one folder only"] if classes == 1 else []
    found += [f"no class folder with pictures in {path.name}/" for path in folders.part_folders(folder).values()]
    return ", ".join(found) or "no files"


def _shown(folder: Path, unpacked: bool) -> str:
    return "The archive" if unpacked else str(folder)
