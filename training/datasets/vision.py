"""torchvision's classification data sets by name, and the folders of those that are recognised without it."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torchvision import datasets

from app.errors import DataError
from training.datasets import cifar
from training.datasets.listing import Item, Listing, make_listing

Arguments = Mapping[str, Any]

TRAIN_TEST: dict[str, Arguments] = {"train": {"train": True}, "test": {"train": False}}
SPLITS: dict[str, Arguments] = {"train": {"split": "train"}, "test": {"split": "test"}}
THREE_SPLITS: dict[str, Arguments] = {**SPLITS, "val": {"split": "val"}}


class VisionSet(NamedTuple):
    """A torchvision class, and its keyword arguments for each part."""

    constructor: Callable[..., Any]
    parts: Mapping[str, Arguments]


SETS = {
    "cifar10": VisionSet(datasets.CIFAR10, TRAIN_TEST),
    "cifar100": VisionSet(datasets.CIFAR100, TRAIN_TEST),
    "mnist": VisionSet(datasets.MNIST, TRAIN_TEST),
    "fashionmnist": VisionSet(datasets.FashionMNIST, TRAIN_TEST),
    "kmnist": VisionSet(datasets.KMNIST, TRAIN_TEST),
    "emnist": VisionSet(partial(datasets.EMNIST, split="balanced"), TRAIN_TEST),
    "usps": VisionSet(datasets.USPS, TRAIN_TEST),
    "svhn": VisionSet(datasets.SVHN, SPLITS),
    "stl10": VisionSet(datasets.STL10, SPLITS),
    "gtsrb": VisionSet(datasets.GTSRB, SPLITS),
    "food101": VisionSet(datasets.Food101, SPLITS),
    "flowers102": VisionSet(datasets.Flowers102, THREE_SPLITS),
    "dtd": VisionSet(datasets.DTD, THREE_SPLITS),
    "fgvcaircraft": VisionSet(datasets.FGVCAircraft, THREE_SPLITS),
    "oxfordiiitpet": VisionSet(datasets.OxfordIIITPet, {"train": {"split": "trainval"}, "test": {"split": "test"}}),
    "country211": VisionSet(
        datasets.Country211, {"train": {"split": "train"}, "val": {"split": "valid"}, "test": {"split": "test"}}
    ),
    "imagenette": VisionSet(
        partial(datasets.Imagenette, size="160px"), {"train": {"split": "train"}, "test": {"split": "val"}}
    ),
    "eurosat": VisionSet(datasets.EuroSAT, {"train": {}}),
    "caltech101": VisionSet(datasets.Caltech101, {"train": {}}),
    "caltech256": VisionSet(datasets.Caltech256, {"train": {}}),
}

# Files that torchvision's own folders have, and the name of their set.
SIGNATURES = {
    "MNIST/raw/train-images-idx3-ubyte": "mnist",
    "FashionMNIST/raw/train-images-idx3-ubyte": "fashionmnist",
    "KMNIST/raw/train-images-idx3-ubyte": "kmnist",
    "EMNIST/raw/emnist-balanced-train-images-idx3-ubyte": "emnist",
    "train_32x32.mat": "svhn",
    "stl10_binary/train_X.bin": "stl10",
    "gtsrb/GTSRB/Training": "gtsrb",
}


def recognise(folder: Path) -> str | None:
    """The name of the set whose folder this is, by its files."""
    return next((name for file, name in SIGNATURES.items() if (folder / file).exists()), None)


def download(name: str, root: Path) -> None:
    """Downloads the set where it is missing; raises DataError."""
    known = SETS[name]
    try:
        for arguments in known.parts.values():
            known.constructor(root=root, download=True, **arguments)
    except Exception as error:  # urllib's, torchvision's and the archive reader's errors
        raise DataError(f"Cannot download {name}: {' '.join(str(error).split())[:300]}") from error


def read(name: str, root: Path) -> Listing:
    """The set of this name below `root`; raises DataError where it is missing or broken."""
    if name in ("cifar10", "cifar100") and (listing := cifar.read(root)):
        return listing
    known = SETS[name]
    try:
        parts = {part: known.constructor(root=root, **arguments) for part, arguments in known.parts.items()}
        return _listing(name, parts)
    except ImportError as error:
        raise DataError(f"{name} needs a library that is not installed: {error}.") from error
    except (RuntimeError, OSError, ValueError, KeyError, IndexError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(
            f"{root} does not hold {name} ({reason}); --dataset {name} --download downloads it there."
        ) from error


def _listing(name: str, parts: Mapping[str, Any]) -> Listing:
    names = _class_names(next(iter(parts.values())))
    listed = {part: _items(part, loaded, names) for part, loaded in parts.items()}
    return make_listing(name, "torchvision data set", listed, names)


def _class_names(loaded: Any) -> list[str] | None:
    found = getattr(loaded, "classes", None) or getattr(loaded, "categories", None)
    return [name if isinstance(name, str) else ", ".join(name) for name in found] if found else None


def _items(part: str, loaded: Any, names: list[str] | None) -> list[Item]:
    labels = _labels(loaded)
    return [
        # The decoded picture: torchvision's transforms are not set, so an item is (picture, label).
        Item(f"{part}[{i}]", partial(_picture, loaded, i), str(label) if names is None else names[label])
        for i, label in enumerate(labels)
    ]


def _picture(loaded: Any, index: int) -> Any:
    return loaded[index][0]


def _labels(loaded: Any) -> list[int]:
    """The label of each picture, from an attribute where the class has one: reading an item decodes its picture."""
    for attribute in ("targets", "labels", "_labels", "y"):
        found = getattr(loaded, attribute, None)
        if found is not None:
            return [int(label) for label in np.asarray(found).tolist()]
    if samples := getattr(loaded, "_samples", None):
        return [int(label) for _, label in samples]
    return [int(loaded[i][1]) for i in range(len(loaded))]
