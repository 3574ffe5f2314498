"""A data folder as uint8 tensors: torchvision's CIFAR-10, or DIR/train/<class>/* and DIR/test/<class>/*."""

from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchvision.datasets import CIFAR10

from app.errors import DataError, RequestError
from app.model.preprocessing import Limits, decode

MAX_PIXELS = 1 << 28  # a folder's owner is trusted with large pictures, not with endless ones

PARTS = ("train", "test")


@dataclass(frozen=True)
class Split:
    """Images uint8 [N, size, size, 3], labels int64 [N]."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, index: Tensor) -> "Split":
        return Split(self.images[index], self.labels[index])


class DataSet(NamedTuple):
    """A part that was not asked for is empty."""

    name: str
    classes: list[str]
    train: Split
    test: Split
    rejected: list[tuple[Path, str]]  # files that are no images, with the reason


def download(root: Path) -> None:
    """Fetches CIFAR-10 through torchvision, unless it is there; raises DataError."""
    try:
        CIFAR10(root, download=True)
    except (RuntimeError, OSError) as error:
        raise DataError(f"CIFAR-10 cannot be fetched: {error}.") from error


def load(root: Path, size: int, parts: Collection[str] = PARTS) -> DataSet:
    """Reads the parts asked for of either form of data folder, pictures scaled to size x size; raises DataError."""
    if any((root / part).is_dir() for part in PARTS):
        return _load_folder(root, size, parts)
    try:
        train, test = (CIFAR10(root, train=part == "train") for part in PARTS)
    except (RuntimeError, OSError) as error:
        raise DataError(
            f"{root} holds neither cifar-10-batches-py/ nor train/<class>/ folders; --download fetches CIFAR-10."
        ) from error
    if size != train.data.shape[1]:
        raise DataError(f"CIFAR-10 has pictures of 32 x 32; --image-size {size} needs an image folder.")
    train_split, test_split = (
        Split(torch.from_numpy(np.ascontiguousarray(read.data)), torch.tensor(read.targets))
        if part in parts
        else _nothing(size)
        for part, read in zip(PARTS, (train, test), strict=True)
    )
    return DataSet("CIFAR-10", train.classes, train_split, test_split, rejected=[])


def holdout(split: Split, share: float, seed: int) -> tuple[Split, Split]:
    """Splits off a share of every class, at least one image of each; gives (rest, held out). Raises DataError."""
    order = torch.randperm(len(split), generator=torch.Generator().manual_seed(seed))
    mask = torch.zeros(len(split), dtype=torch.bool)
    for label in split.labels.unique():
        members = order[split.labels[order] == label]
        if len(members) < 2:
            raise DataError("Every class needs two training pictures, one of them to be held out.")
        mask[members[: max(1, round(share * len(members)))]] = True
    return split.take(~mask), split.take(mask)


def _nothing(size: int) -> Split:
    return Split(torch.empty(0, size, size, 3, dtype=torch.uint8), torch.empty(0, dtype=torch.int64))


def _load_folder(root: Path, size: int, parts: Collection[str]) -> DataSet:
    for part in parts:
        if not (root / part).is_dir():
            hint = "; --skip-test trains without test pictures" if part == "test" and "train" in parts else ""
            raise DataError(f"{root / part} is missing{hint}.")
    classes, *others = (_classes(root / part) for part in PARTS if part in parts)
    if len(classes) < 2:
        raise DataError(f"{root} holds {len(classes)} class folders; at least 2 are needed.")
    for other in others:
        if unknown := sorted(set(other) - set(classes)):
            raise DataError(f"{root / 'test'} has classes that {root / 'train'} lacks: {', '.join(unknown)}.")
    rejected: list[tuple[Path, str]] = []
    train, test = (
        _load_split(root / part, classes, size, rejected) if part in parts else _nothing(size) for part in PARTS
    )
    return DataSet(root.resolve().name, classes, train, test, rejected)


def _classes(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _load_split(folder: Path, classes: list[str], size: int, rejected: list[tuple[Path, str]]) -> Split:
    files = [(path, label) for label, name in enumerate(classes) for path in _files(folder / name)]
    images, labels, before = [], [], len(rejected)
    with ThreadPoolExecutor() as pool:
        for (path, label), result in zip(files, pool.map(lambda f: _read(f[0], size), files), strict=True):
            if isinstance(result, str):
                rejected.append((path, result))
            else:
                images.append(result)
                labels.append(label)
    if empty := [classes[label] for label in sorted(set(range(len(classes))) - set(labels))]:
        there = ((path, why) for path, why in rejected[before:] if path.relative_to(folder).parts[0] in empty)
        hint = next((f" {path.name} was left out: {why}" for path, why in there), "")
        raise DataError(f"{folder} has no pictures for: {', '.join(empty)}.{hint}")
    return Split(torch.from_numpy(np.stack(images)), torch.tensor(labels))


def _files(folder: Path) -> Iterator[Path]:
    """All below the folder, but what is hidden: editors and desktops keep copies and thumbnails there."""
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts):
            yield path


def _read(path: Path, size: int) -> np.ndarray | str:
    try:
        return decode(path.read_bytes(), Limits(size, MAX_PIXELS)).pixels
    except (RequestError, OSError) as error:
        return str(error)
