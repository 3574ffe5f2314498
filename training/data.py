"""A data folder as uint8 tensors: torchvision's CIFAR-10, or DIR/train/<class>/* and DIR/test/<class>/*."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchvision.datasets import CIFAR10

from app.errors import DataError, RequestError
from app.model.images import Limits, decode

MAX_PIXELS = 1 << 28  # a folder's owner is trusted with large pictures, not with endless ones


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


def load(root: Path, size: int) -> DataSet:
    """Reads either form of data folder, pictures of any size scaled to size x size; raises DataError."""
    if (root / "train").is_dir():
        return _load_folder(root, size)
    try:
        train, test = (CIFAR10(root, train=t) for t in (True, False))
    except (RuntimeError, OSError) as error:
        raise DataError(
            f"{root} holds neither cifar-10-batches-py/ nor train/<class>/ folders; --download fetches CIFAR-10."
        ) from error
    if size != train.data.shape[1]:
        raise DataError(f"CIFAR-10 has pictures of 32 x 32; --image-size {size} needs an image folder.")
    train_split, test_split = (
        Split(torch.from_numpy(np.ascontiguousarray(part.data)), torch.tensor(part.targets)) for part in (train, test)
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


def _load_folder(root: Path, size: int) -> DataSet:
    classes = sorted(path.name for path in (root / "train").iterdir() if path.is_dir())
    if len(classes) < 2:
        raise DataError(f"{root / 'train'} holds {len(classes)} class folders; at least 2 are needed.")
    rejected: list[tuple[Path, str]] = []
    train, test = (_load_split(root / part, classes, size, rejected) for part in ("train", "test"))
    return DataSet(root.resolve().name, classes, train, test, rejected)


def _load_split(folder: Path, classes: list[str], size: int, rejected: list[tuple[Path, str]]) -> Split:
    if not folder.is_dir():
        raise DataError(f"{folder} is missing.")
    files = [(path, label) for label, name in enumerate(classes) for path in _files(folder / name)]
    images, labels = [], []
    with ThreadPoolExecutor() as pool:
        for (path, label), result in zip(files, pool.map(lambda f: _read(f[0], size), files), strict=True):
            if isinstance(result, str):
                rejected.append((path, result))
            else:
                images.append(result)
                labels.append(label)
    counts = np.bincount(labels, minlength=len(classes)) if labels else np.zeros(len(classes))
    if not counts.all():
        empty = ", ".join(name for name, count in zip(classes, counts, strict=True) if not count)
        raise DataError(f"{folder} has no pictures for: {empty}.")
    return Split(torch.from_numpy(np.stack(images)), torch.tensor(labels))


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file() and not path.name.startswith("."))


def _read(path: Path, size: int) -> np.ndarray | str:
    try:
        return decode(path.read_bytes(), Limits(size, MAX_PIXELS)).pixels
    except (RequestError, OSError) as error:
        return str(error)
