"""A data folder as uint8 tensors: torchvision's CIFAR-10, or DIR/train/<class>/* and DIR/test/<class>/*."""

import hashlib
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchvision.datasets import CIFAR10

from app.errors import DataError, RequestError
from app.model.preprocessing import DecodedImage, Limits, decode

# The owner of a folder is trusted with large images; the limit stops decompression bombs only.
MAX_PIXELS = 1 << 28

SPLITS = ("train", "test")


@dataclass(frozen=True)
class Split:
    """Images uint8 [N, S, S, 3] and labels int64 [N], both in memory: CIFAR-10 is 184 MB."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def select(self, index: Tensor) -> "Split":
        """The images at these positions int64 [M], or where the mask bool [N] is true."""
        return Split(self.images[index], self.labels[index])

    def sample(self, count: int, seed: int = 0) -> "Split":
        """At most `count` random images: folders are sorted by class, so the first images are of the first classes."""
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        return self.select(order[:count]) if len(self) > count else self


class Dataset(NamedTuple):
    """A split that was not requested is empty. `rejected` lists unreadable files with the reason.

    `dark_16_bit` lists files of 16 bits a channel whose values need 12: the service sees them nearly black, too.
    """

    name: str
    classes: list[str]
    train: Split
    test: Split
    rejected: list[tuple[Path, str]]
    dark_16_bit: Sequence[Path] = ()


def download(root: Path) -> None:
    """Downloads CIFAR-10 with torchvision where it is missing; raises DataError."""
    try:
        CIFAR10(root, download=True)
    except (RuntimeError, OSError) as error:
        raise DataError(f"Cannot download CIFAR-10: {error}.") from error


def load(root: Path, size: int, splits: Collection[str] = SPLITS) -> Dataset:
    """Reads the requested splits of either kind of folder, with images of size x size; raises DataError."""
    if any((root / split).is_dir() for split in SPLITS):
        return _load_image_folder(root, size, splits)
    try:
        parts = [CIFAR10(root, train=split == "train") for split in SPLITS]
    except (RuntimeError, OSError) as error:
        raise DataError(
            f"{root} holds neither cifar-10-batches-py/ nor train/<class>/ folders; --download fetches CIFAR-10."
        ) from error
    if size != parts[0].data.shape[1]:
        raise DataError(f"CIFAR-10 has images of 32 x 32; --image-size {size} needs an image folder.")
    train, test = (
        # torchvision's array is a transposed view of the file's planes.
        Split(torch.from_numpy(np.ascontiguousarray(part.data)), torch.tensor(part.targets))
        if split in splits
        else _empty_split(size)
        for split, part in zip(SPLITS, parts, strict=True)
    )
    return Dataset("CIFAR-10", parts[0].classes, train, test, rejected=[])


def fingerprint(dataset: Dataset) -> dict[str, Any]:
    """What identifies the training data: `classes`, `number of images` and `content`, a SHA-256 over all of it."""
    digest = hashlib.sha256(dataset.train.images.contiguous().numpy().data)
    digest.update(dataset.train.labels.numpy().data)
    return {
        "classes": dataset.classes,
        "number of images": len(dataset.train),
        "content": digest.hexdigest(),
    }


def train_val_split(split: Split, val_fraction: float, seed: int) -> tuple[Split, Split]:
    """(training, validation) by `val_mask`."""
    mask = val_mask(split, val_fraction, seed)
    return split.select(~mask), split.select(mask)


def val_mask(split: Split, val_fraction: float, seed: int) -> Tensor:
    """Mask bool [N] of the validation images: a share of each class, and at least one image.

    Raises DataError for a class of one image.
    """
    # A generator of its own: the split must not depend on what else has drawn random numbers.
    order = torch.randperm(len(split), generator=torch.Generator().manual_seed(seed))
    mask = torch.zeros(len(split), dtype=torch.bool)
    for label in split.labels.unique():
        members = order[split.labels[order] == label]
        if len(members) < 2:
            raise DataError("Every class needs two training images: one of them is for validation.")
        mask[members[: max(1, round(val_fraction * len(members)))]] = True
    return mask


def _empty_split(size: int) -> Split:
    return Split(torch.empty(0, size, size, 3, dtype=torch.uint8), torch.empty(0, dtype=torch.int64))


def _load_image_folder(root: Path, size: int, splits: Collection[str]) -> Dataset:
    for split in splits:
        if not (root / split).is_dir():
            hint = "; --no-test trains without test images" if split == "test" and "train" in splits else ""
            raise DataError(f"{root / split} is missing{hint}.")
    # The training folder defines the classes and their order; a test folder may lack some.
    classes, *others = (_class_names(root / split) for split in SPLITS if split in splits)
    if len(classes) < 2:
        raise DataError(f"{root} holds {len(classes)} class folders; at least 2 are needed.")
    for other in others:
        if unknown := sorted(set(other) - set(classes)):
            raise DataError(f"{root / 'test'} has classes that {root / 'train'} lacks: {', '.join(unknown)}.")
    rejected: list[tuple[Path, str]] = []
    dark_16_bit: list[Path] = []
    train, test = (
        _load_split(root / split, classes, size, rejected, dark_16_bit) if split in splits else _empty_split(size)
        for split in SPLITS
    )
    return Dataset(root.resolve().name, classes, train, test, rejected, dark_16_bit)


def _class_names(folder: Path) -> list[str]:
    # Sorted, since the order of directory entries differs between file systems.
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _load_split(
    folder: Path, classes: list[str], size: int, rejected: list[tuple[Path, str]], dark_16_bit: list[Path]
) -> Split:
    """Reads the images of every class folder; appends to `rejected` and `dark_16_bit`."""
    files = [(path, label) for label, name in enumerate(classes) for path in _image_paths(folder / name)]
    images, labels, rejected_before = [], [], len(rejected)
    # Threads are enough: Pillow releases the interpreter's lock while it decodes.
    with ThreadPoolExecutor() as pool:
        for (path, label), result in zip(files, pool.map(lambda file: _read(file[0], size), files), strict=True):
            if isinstance(result, str):
                rejected.append((path, result))
            else:
                if result.dark_16_bit:
                    dark_16_bit.append(path)
                images.append(result.pixels)
                labels.append(label)
    if empty := [classes[label] for label in sorted(set(range(len(classes))) - set(labels))]:
        # A class of unreadable files only: the first reason is more useful than the empty class.
        reasons = (item for item in rejected[rejected_before:] if item[0].relative_to(folder).parts[0] in empty)
        hint = next((f" {path.name} was rejected: {reason}" for path, reason in reasons), "")
        raise DataError(f"{folder} has no images for: {', '.join(empty)}.{hint}")
    return Split(torch.from_numpy(np.stack(images)), torch.tensor(labels))


def _image_paths(folder: Path) -> Iterator[Path]:
    """All files below the folder but hidden ones: editors and desktops keep copies and thumbnails there."""
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts):
            yield path


def _read(path: Path, size: int) -> DecodedImage | str:
    """The image as the service decodes it, or the reason why there is none."""
    try:
        return decode(path.read_bytes(), Limits(size, MAX_PIXELS))
    except (RequestError, OSError) as error:
        return str(error)
