"""A data set as uint8 tensors, of any form in `training.datasets`."""

import hashlib
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from app.errors import DataError
from app.model.preprocessing import DecodedImage
from training.datasets import discovery, pictures, vision
from training.datasets.listing import Item, Listing, shortened
from training.datasets.selection import Selection
from training.datasets.splitting import hold_out

SPLITS = ("train", "test")
HELD_OUT = ("test_fraction", "split_seed")  # keys of `Dataset.held_out` in the recipe of a card


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
    """A split that was not requested, or that the data lack, is empty; `val` is None without a validation part.

    `dark_16_bit` lists files of 16 bits a channel whose values need 12: in the service they are nearly black, too.
    `rejected` lists unreadable files with the reason, `notes` what else a person should see, a line each. `held_out` is
    the fraction and the seed of a test part that was held out; fraction 0 for data with parts of their own.
    """

    name: str
    classes: list[str]
    train: Split
    test: Split
    rejected: list[tuple[Path, str]]
    val: Split | None = None
    notes: Sequence[str] = ()
    dark_16_bit: Sequence[Path] = ()
    held_out: tuple[float, int] = (0.0, 0)

    def test_part(self) -> dict[str, float]:
        """What a card's recipe records of `held_out`."""
        return dict(zip(HELD_OUT, self.held_out, strict=True))


def download(root: Path, dataset: str = "cifar10") -> None:
    """Downloads the torchvision set where it is missing; raises DataError."""
    vision.download(dataset, root)


def load(
    root: Path,
    size: int,
    splits: Collection[str] = SPLITS,
    selection: Selection = Selection(),  # noqa: B008
    unread: Collection[str] = (),
) -> Dataset:
    """Reads the requested splits with images of size x size; the validation part comes with the training part.

    Data without a test part give a stratified share of their training part, unless they have a validation part. A
    requested split that is in `unread` is held out as well, but none of its images is read. Raises DataError.
    """
    with discovery.open_listing(root, selection.dataset) as found:
        listing = _with_requested(found, root, splits, selection)
        reader = _Reader(listing, size)
        wanted = set(splits) - set(unread) | ({"val"} if "train" in splits else set())
        train, val, test = (reader.read(part if part in wanted else "") for part in ("train", "val", "test"))
        is_held_out = set(found.parts) == {"train"} and "test" in listing.parts
        return Dataset(
            listing.name,
            listing.classes,
            train,
            test,
            reader.rejected,
            val if len(val) else None,
            reader.notes,
            reader.dark_16_bit,
            (selection.test_fraction, selection.split_seed) if is_held_out else (0.0, 0),
        )


def with_validation(dataset: Dataset) -> tuple[Dataset, Tensor | None]:
    """The data's own validation part behind the training images, and its mask bool [N]; without one, None."""
    if dataset.val is None:
        return dataset, None
    parts = dataset.train, dataset.val
    together = Split(torch.cat([part.images for part in parts]), torch.cat([part.labels for part in parts]))
    mask = torch.arange(len(together)) >= len(dataset.train)
    return dataset._replace(train=together, val=None), mask


def with_labels_of(classes: list[str], dataset: Dataset, folder: Path) -> Dataset:
    """The data set with labels that are positions in `classes`; raises DataError for a class that is not there."""
    if unknown := [name for name in dataset.classes if name not in classes]:
        raise DataError(f"{folder} has other classes than the weights: {shortened(unknown)}.")
    positions = torch.tensor([classes.index(name) for name in dataset.classes])

    def mapped(split: Split) -> Split:
        return Split(split.images, positions[split.labels])

    val = None if dataset.val is None else mapped(dataset.val)
    return dataset._replace(classes=classes, train=mapped(dataset.train), test=mapped(dataset.test), val=val)


def training_and_validation(dataset: Dataset, fraction: float, seed: int) -> tuple[Split, Split]:
    """(training, validation): the data's own validation part, or else a random share of the training images.

    Raises DataError as `train_val_split` does.
    """
    return (dataset.train, dataset.val) if dataset.val else train_val_split(dataset.train, fraction, seed)


def recorded_split(dataset: Dataset, *recipes: Mapping[str, Any]) -> tuple[Split, Split]:
    """(training, validation) of the runs that the recipes of model cards record.

    Raises DataError if they differ from each other or from the test part that is held out now: images that trained a
    network would validate or test all.
    """
    _check_held_out(dataset, recipes)
    # "holdout" is the former name of "val_fraction".
    recorded = {(float(recipe.get("val_fraction") or recipe["holdout"]), recipe["seed"]) for recipe in recipes}
    if len(recorded) > 1 and not dataset.val:
        pairs = " and ".join(f"--val-fraction {fraction:g} --seed {seed}" for fraction, seed in sorted(recorded))
        raise DataError(f"The networks were trained with {pairs}; a cascade needs one held-out part.")
    return training_and_validation(dataset, *min(recorded))


def _check_held_out(dataset: Dataset, recipes: Sequence[Mapping[str, Any]]) -> None:
    if parts := other_test_part(dataset, recipes):
        raise DataError(f"A network was trained with {parts}; the test parts must be equal.")


def other_test_part(dataset: Dataset, recipes: Sequence[Mapping[str, Any]]) -> str:
    """The test part that a card records, and that of the data, if they differ; empty for a card without a record."""
    recorded = {(float(recipe[HELD_OUT[0]]), int(recipe[HELD_OUT[1]])) for recipe in recipes if HELD_OUT[0] in recipe}
    if not (others := sorted(recorded - {dataset.held_out})):
        return ""
    was, now = (
        f"--test-fraction {fraction:g} --split-seed {seed}" if fraction else "no test part held out of the data"
        for fraction, seed in (others[0], dataset.held_out)
    )
    return f"{was}; the data are read with {now}"


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
    """Mask bool [N] of the validation images: a share of each class, but neither none nor all of its images.

    Raises DataError for a class of one image.
    """
    # A generator of its own: the split must not depend on what else has drawn random numbers.
    order = torch.randperm(len(split), generator=torch.Generator().manual_seed(seed))
    mask = torch.zeros(len(split), dtype=torch.bool)
    for label in split.labels.unique():
        members = order[split.labels[order] == label]
        if len(members) < 2:
            raise DataError("Every class needs two training images: one of them is for validation.")
        held_out = max(1, round(val_fraction * len(members)))
        mask[members[: min(held_out, len(members) - 1)]] = True
    return mask


def _with_requested(listing: Listing, root: Path, splits: Collection[str], selection: Selection) -> Listing:
    """The listing with every requested part that the data can give."""
    if "train" in splits and "train" not in listing.parts:
        found = shortened(sorted(listing.parts))
        raise DataError(f"{root} ({listing.form}) has no training part; found: {found}.")
    if "test" in splits:
        listing = hold_out(listing, selection.test_fraction, selection.split_seed)
    if "train" in splits and "train" not in listing.parts:
        raise DataError(f"--test-fraction {selection.test_fraction:g} leaves no picture for the training.")
    if list(splits) == ["test"] and "test" not in listing.parts and "val" in listing.parts:
        parts = {**listing.parts, "test": listing.parts["val"]}
        return listing._replace(parts=parts, notes=[*listing.notes, "no test part: the validation part is read"])
    if list(splits) == ["test"] and "test" not in listing.parts:
        raise DataError(f"{root} ({listing.form}) has no test part and too few pictures to hold some out.")
    return listing


class _Reader:
    """Decodes the parts of a listing; collects rejected files and notes."""

    def __init__(self, listing: Listing, size: int) -> None:
        self._listing, self._size = listing, size
        self._index = {name: label for label, name in enumerate(listing.classes)}
        self.rejected: list[tuple[Path, str]] = []
        self.notes = list(listing.notes)
        self.dark_16_bit: list[Path] = []

    def read(self, part: str) -> Split:
        """An empty split for a part that the listing lacks. Raises DataError for a class without readable images."""
        items = self._listing.parts.get(part, [])
        if not items:
            return Split(
                torch.empty(0, self._size, self._size, 3, dtype=torch.uint8), torch.empty(0, dtype=torch.int64)
            )
        results = self._decode(items)
        pairs = list(zip(items, results, strict=True))
        read = [(image.pixels, self._index[item.label]) for item, image in pairs if not isinstance(image, str)]
        self.dark_16_bit += [_place(item) for item, image in pairs if not isinstance(image, str) and image.dark_16_bit]
        rejected = [(item, reason) for item, reason in pairs if isinstance(reason, str)]
        self.rejected += [(_place(item), reason) for item, reason in rejected]
        self._check_classes(part, {label for _, label in read}, rejected)
        images = np.stack([pixels for pixels, _ in read])
        return Split(torch.from_numpy(images), torch.tensor([label for _, label in read]))

    def _decode(self, items: Sequence[Item]) -> list[DecodedImage | str]:
        if all(isinstance(item.source, np.ndarray) for item in items):  # nothing to decode: threads save no time
            return [pictures.decode_source(item.source, self._size) for item in items]
        # Threads are enough: Pillow releases the interpreter's lock while it decodes.
        with ThreadPoolExecutor() as pool:
            return list(pool.map(lambda item: pictures.decode_source(item.source, self._size), items))

    def _check_classes(self, part: str, read: set[int], rejected: list[tuple[Item, str]]) -> None:
        empty = [name for name, label in self._index.items() if label not in read]
        unreadable = [(item, reason) for item, reason in rejected if item.label in empty]
        if unreadable:
            item, reason = unreadable[0]
            names = shortened(name for name in empty if name in {each.label for each, _ in unreadable})
            raise DataError(
                f"The {part} part of {self._listing.name} has no readable images for: {names}. "
                f"{Path(item.name).name} was rejected: {reason}"
            )
        if empty:
            self.notes.append(f"the {part} part lacks {len(empty)} of {len(self._index)} classes: {shortened(empty)}")


def _place(item: Item) -> Path:
    return item.source if isinstance(item.source, Path) else Path(item.name)
