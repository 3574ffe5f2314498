"""MedMNIST's and Keras' .npz, and what is refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from app.errors import DataError
from training.datasets import arrays

IMAGES = np.random.default_rng(0).integers(0, 256, (6, 28, 28, 3), dtype=np.uint8)
LABELS = np.arange(6) % 2


def write(folder: Path, **content: Any) -> Path:
    np.savez(folder / "x.npz", **content)
    return folder / "x.npz"


def counts(file: Path) -> dict[str, int]:
    return {part: len(items) for part, items in arrays.read(file).parts.items()}


def test_medmnist_is_read_with_its_validation_part(tmp_path: Path) -> None:
    content = {f"{part}_images": IMAGES for part in ("train", "val", "test")}
    content |= {f"{part}_labels": LABELS[:, None].astype(np.uint8) for part in ("train", "val", "test")}
    file = write(tmp_path, **content)
    assert counts(file) == {"train": 6, "val": 6, "test": 6}
    assert arrays.read(file).classes == ["0", "1"]
    first = arrays.read(file).parts["train"][0]
    assert (first.name, first.label) == ("train[0]", "0")
    assert np.array_equal(np.asarray(first.source), IMAGES[0])


def test_other_names_of_the_arrays_are_read(tmp_path: Path) -> None:
    keras = write(tmp_path, x_train=IMAGES[..., 0], y_train=LABELS, x_test=IMAGES[..., 0], y_test=LABELS)
    assert counts(keras) == {"train": 6, "test": 6}
    assert counts(write(tmp_path, images=IMAGES, labels=np.array(["cat", "dog"] * 3))) == {"train": 6}


@pytest.mark.parametrize(
    "images",
    [
        IMAGES.transpose(0, 3, 1, 2),
        (IMAGES / 255).astype(np.float32),
        IMAGES.astype(np.float64),
        IMAGES.astype(np.int64),
        IMAGES.astype(np.uint16) * 257,
    ],
)
def test_other_shapes_and_types_give_the_same_pixels(images: np.ndarray) -> None:
    assert np.array_equal(arrays.pixels_of(images, "x"), IMAGES)


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ({"a": IMAGES}, "has the arrays a; train_images and train_labels"),
        ({"images": IMAGES, "labels": LABELS[:5]}, "6 pictures and 5 labels"),
        ({"images": IMAGES[..., 0][..., None].repeat(28, -1), "labels": LABELS}, "none of pictures"),
        ({"images": IMAGES.astype(np.int64) * 300, "labels": LABELS}, "0 to 255 or 0 to 1 is expected"),
        ({"images": IMAGES, "labels": np.ones((6, 14), int)}, "several labels each .14 columns"),
        ({"images": np.array([{}], dtype=object), "labels": LABELS[:1]}, "cannot be read as .npz: Object arrays"),
        ({"images": IMAGES, "labels": np.zeros(6)}, "one class, 0; at least two"),
    ],
)
def test_other_content_gives_one_line(tmp_path: Path, content: dict[str, Any], line: str) -> None:
    with pytest.raises(DataError, match=line):
        arrays.read(write(tmp_path, **content))


def test_broken_file_gives_one_line(tmp_path: Path) -> None:
    (tmp_path / "x.npz").write_bytes(b"PK\3\4" + b"x" * 50)
    with pytest.raises(DataError, match=r"x\.npz cannot be read as \.npz"):
        arrays.read(tmp_path / "x.npz")


def test_one_hot_rows_are_labels() -> None:
    assert arrays.label_names(np.eye(3, dtype=int), "x") == ["0", "1", "2"]
    assert arrays.label_names(np.array([1.0, 0.0]), "x") == ["1", "0"]


def test_damaged_compressed_file_gives_one_line(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (20, 16, 16, 3), dtype=np.uint8)
    np.savez_compressed(tmp_path / "x.npz", images=noise, labels=np.arange(20) % 2)
    damaged = bytearray((tmp_path / "x.npz").read_bytes())
    damaged[60:200] = b"\xff" * 140
    (tmp_path / "x.npz").write_bytes(damaged)
    with pytest.raises(DataError, match=r"x\.npz cannot be read as \.npz: "):
        arrays.read(tmp_path / "x.npz")
