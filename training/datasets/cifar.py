"""CIFAR-10's and CIFAR-100's python version, and subsets of it.

torchvision unpickles these files after comparing their MD5 with that of the published ones, so it refuses a subset.
This module reads both: its unpickler builds arrays and plain containers only.
"""

import pickle
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from app.errors import DataError
from training.datasets.listing import Item, Listing, make_listing

ALLOWED = {
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("_codecs", "encode"),
}


class Layout(NamedTuple):
    name: str
    dataset: str  # for --dataset
    folder: str
    meta: str
    train: tuple[str, ...]
    test: str
    names: str
    labels: str


LAYOUTS = (
    Layout(
        "CIFAR-10",
        "cifar10",
        "cifar-10-batches-py",
        "batches.meta",
        tuple(f"data_batch_{i}" for i in range(1, 6)),
        "test_batch",
        "label_names",
        "labels",
    ),
    Layout("CIFAR-100", "cifar100", "cifar-100-python", "meta", ("train",), "test", "fine_label_names", "fine_labels"),
)


def read(root: Path) -> Listing | None:
    """DIR/cifar-10-batches-py or DIR/cifar-100-python, or that folder itself; None for another form.

    Raises DataError for a missing, broken or forged file.
    """
    for layout in LAYOUTS:
        folder = next((path for path in (root / layout.folder, root) if (path / layout.meta).is_file()), None)
        if folder is None and (root / layout.folder).is_dir():
            folder = root / layout.folder
        if folder is not None:
            return _read(folder, layout)
    return None


def _read(folder: Path, layout: Layout) -> Listing:
    try:
        meta = _unpickle(folder / layout.meta)
        names = [_text(name) for name in meta[layout.names]]
        parts = {
            "train": [item for file in layout.train for item in _items(folder / file, "train", layout, names)],
            "test": _items(folder / layout.test, "test", layout, names),
        }
    except FileNotFoundError as error:
        raise DataError(
            f"{error.filename} is missing; --dataset {layout.dataset} --download completes the data set."
        ) from None
    except (KeyError, IndexError, ValueError, TypeError, AttributeError) as error:
        raise DataError(f"{folder} does not have the content of {layout.name}: {error!r}.") from error
    return make_listing(layout.name, "CIFAR folder", parts, names)


def _items(file: Path, part: str, layout: Layout, names: list[str]) -> list[Item]:
    content = _unpickle(file)
    pixels: NDArray[np.uint8] = np.ascontiguousarray(content["data"].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
    if pixels.dtype != np.uint8:
        raise ValueError(f"{file.name} has pixels of {pixels.dtype}")
    labels = [names[label] for label in content[layout.labels]]
    return [
        Item(f"{file.name}[{i}]", image, label) for i, (image, label) in enumerate(zip(pixels, labels, strict=True))
    ]


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ALLOWED:
            raise pickle.UnpicklingError(f"it refers to {module}.{name}")
        return super().find_class(module, name)


def _unpickle(file: Path) -> dict[str, Any]:
    try:
        with file.open("rb") as stream:
            content = _Unpickler(stream, encoding="bytes").load()
        return {_text(key): value for key, value in content.items()}
    except FileNotFoundError:
        raise
    except Exception as error:  # unpickling broken bytes raises whatever its opcodes trip over
        raise DataError(f"{file} cannot be read as a CIFAR file: {error}.") from error


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
