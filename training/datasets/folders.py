"""Folders of classes: DIR/train/<class>/* with test/ and val/ beside it, or DIR/<class>/*."""

import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from training.datasets.listing import Item, Listing, make_listing, part_name, plural, shortened
from training.datasets.pictures import is_meant_as_picture

# Files and folders that desktops and archivers leave behind.
JUNK = {"thumbs.db", "desktop.ini", "__macosx", "ehthumbs.db", "$recycle.bin"}

SAMPLE = 50  # files of a folder that decide whether it is one of pictures


def is_hidden(name: str) -> bool:
    """Also of the copies that macOS leaves on other disks, `._cat.png`."""
    return name.startswith(".") or name.lower() in JUNK


def subfolders(folder: Path) -> list[Path]:
    # Sorted, since the order of directory entries differs between file systems.
    return sorted(path for path in folder.iterdir() if path.is_dir() and not is_hidden(path.name))


def files_below(folder: Path) -> Iterator[Path]:
    """All files but hidden ones, through symbolic links; a folder that links lead to twice is read once."""
    visited, parents = set[str](), Path(os.path.realpath(folder)).parents
    for root, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(root)
        if real in visited or Path(real) in parents:
            folders.clear()
            continue
        visited.add(real)
        folders[:] = sorted(name for name in folders if not is_hidden(name))
        yield from (Path(root, name) for name in sorted(files) if not is_hidden(name))


def is_class(folder: Path) -> bool:
    """Whether pictures are among its first files."""
    return any(is_meant_as_picture(path) for path in islice(files_below(folder), SAMPLE))


def part_folders(folder: Path) -> dict[str, Path]:
    """The folders of parts, under any of their names and in any case.

    A folder that holds another part is none: it is the top folder of an archive that is called `test`.
    """
    named = [(part_name(path.name), path) for path in subfolders(folder)]
    return {part: path for part, path in named if part and not _inner_parts(path) - {part}}


def class_root(folder: Path) -> Path:
    """The folder, or the only subfolder of pictures where the classes are one level below it."""
    candidates = [path for path in subfolders(folder) if is_class(path)]
    if len(candidates) != 1:
        return folder
    (inner,) = candidates
    doubled = part_name(inner.name) is not None and part_name(inner.name) == part_name(folder.name)
    return inner if doubled or sum(map(is_class, subfolders(inner))) > 1 else folder


def read_parts(folder: Path) -> Listing | None:
    """DIR/train/<class>/* and its like, or None for another form."""
    roots = {part: class_root(path) for part, path in part_folders(folder).items()}
    classes = {part: [path for path in subfolders(root) if is_class(path)] for part, root in roots.items()}
    if not any(classes.values()):
        return None
    parts = {part: _items(folder, paths) for part, paths in classes.items()}
    notes = [note for part, root in roots.items() for note in _left_out(root, classes[part])]
    return make_listing(folder.resolve().name, "image folder", parts, notes=notes)


def read_flat(folder: Path) -> Listing | None:
    """DIR/<class>/*, or None for another form."""
    classes = [path for path in subfolders(folder) if is_class(path)]
    if len(classes) < 2 or all(part_name(path.name) for path in classes):  # train/*.png has no classes
        return None
    parts = {"train": _items(folder, classes)}
    return make_listing(folder.resolve().name, "flat folder", parts, notes=_left_out(folder, classes))


def _inner_parts(folder: Path) -> set[str]:
    return {
        part for path in subfolders(folder) if (part := part_name(path.name)) and any(map(is_class, subfolders(path)))
    }


def _items(root: Path, classes: list[Path]) -> list[Item]:
    return [Item(str(path.relative_to(root)), path, folder.name) for folder in classes for path in files_below(folder)]


def _left_out(root: Path, classes: list[Path]) -> list[str]:
    others = [path for path in subfolders(root) if path not in classes]
    if not others:
        return []
    names = shortened(path.name for path in others)
    return [f"{plural(len(others), 'folder')} without pictures left out: {names}"]
