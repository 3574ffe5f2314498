"""One .npz of pictures and labels: MedMNIST's `train_images`, Keras' `x_train`, or plain `images` and `labels`."""

import lzma
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from app.errors import DataError
from training.datasets.listing import PARTS, Item, Listing, make_listing, shortened

MAX_BYTES = 16 << 30  # of all arrays together, in memory

UNREADABLE = (
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    ValueError,
    OSError,
    KeyError,
    EOFError,
    RuntimeError,  # an encrypted member, and NotImplementedError for an unknown compression
)

IMAGES, LABELS = ("images", "image", "x", "data", "imgs"), ("labels", "label", "y", "targets", "target")

Array = NDArray[Any]


def read(file: Path) -> Listing:
    """Raises DataError for other arrays than pictures and one label each."""
    arrays = _load(file)
    keys = _pairs(arrays)
    if not keys:
        raise DataError(
            f"{file.name} has the arrays {shortened(sorted(arrays)) or 'none'}; "
            "train_images and train_labels (also val_ and test_), x_train and y_train, or images and labels are read."
        )
    parts = {part: _items(part, arrays[images], arrays[labels], file.name) for part, (images, labels) in keys.items()}
    return make_listing(file.stem, ".npz file", parts)


def _load(file: Path) -> dict[str, Array]:
    try:
        with zipfile.ZipFile(file) as archive:
            size = sum(member.file_size for member in archive.infolist())
        if size > MAX_BYTES:
            raise DataError(f"{file.name} unpacks to {size} bytes; at most {MAX_BYTES} are read.")
        with np.load(file, allow_pickle=False) as content:
            return {name: content[name] for name in content.files}
    except UNREADABLE as error:
        raise DataError(f"{file.name} cannot be read as .npz: {error}.") from error


def _pairs(arrays: Mapping[str, Array]) -> dict[str, tuple[str, str]]:
    """The names of pictures and labels, by part."""
    names = {name.lower(): name for name in arrays}
    found = {}
    for part, aliases in PARTS.items():
        for alias in aliases:
            images = next((names[key] for kind in IMAGES for key in _orders(alias, kind) if key in names), None)
            labels = next((names[key] for kind in LABELS for key in _orders(alias, kind) if key in names), None)
            if images and labels and part not in found:
                found[part] = (images, labels)
    if found:
        return found
    images = next((names[kind] for kind in IMAGES if kind in names), None)
    labels = next((names[kind] for kind in LABELS if kind in names), None)
    return {"train": (images, labels)} if images and labels else {}


def _orders(alias: str, kind: str) -> tuple[str, str]:
    return f"{alias}_{kind}", f"{kind}_{alias}"


def _items(part: str, images: Array, labels: Array, name: str) -> list[Item]:
    pixels, names = pixels_of(images, f"{name}, {part}"), label_names(labels, f"{name}, {part}")
    if len(pixels) != len(names):
        raise DataError(f"{name}, {part}: {len(pixels)} pictures and {len(names)} labels.")
    return [Item(f"{part}[{i}]", image, label) for i, (image, label) in enumerate(zip(pixels, names, strict=True))]


def pixels_of(images: Array, where: str) -> NDArray[np.uint8]:
    """uint8 [N, H, W] or [N, H, W, 1, 3 or 4]; channels first and floats from 0 to 1 are converted.

    Raises DataError for another shape or type.
    """
    if images.ndim == 4 and images.shape[1] in (1, 3) and images.shape[3] not in (1, 3, 4):
        images = images.transpose(0, 2, 3, 1)
    if images.ndim not in (3, 4) or (images.ndim == 4 and images.shape[3] not in (1, 3, 4)):
        raise DataError(f"{where}: an array of shape {images.shape} is none of pictures [N, H, W] or [N, H, W, 3].")
    if images.dtype == np.uint8:
        return np.ascontiguousarray(images)
    if images.dtype == np.uint16:
        return (images >> 8).astype(np.uint8)
    low, high = (float(images.min()), float(images.max())) if images.size else (0.0, 0.0)
    if np.issubdtype(images.dtype, np.floating) and low >= 0 and high <= 1:
        return (images * 255).round().astype(np.uint8)
    if low >= 0 and high <= 255:
        return images.round().astype(np.uint8)
    raise DataError(f"{where}: pixels of {images.dtype} from {low:g} to {high:g}; 0 to 255 or 0 to 1 is expected.")


def label_names(labels: Array, where: str) -> list[str]:
    """One name a picture, from integers, text, [N, 1], or one-hot rows. Raises DataError for several labels each."""
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim == 2:
        if not (np.isin(labels, (0, 1)).all() and (labels.sum(1) == 1).all()):
            raise DataError(f"{where}: pictures with several labels each ({labels.shape[1]} columns) are not read.")
        labels = labels.argmax(1)
    if labels.ndim != 1:
        raise DataError(f"{where}: labels of shape {labels.shape}; one label a picture is expected.")
    if np.issubdtype(labels.dtype, np.floating) and (labels == labels.round()).all():
        labels = labels.astype(np.int64)
    return [label.decode() if isinstance(label, bytes) else str(label) for label in labels.tolist()]
