"""CIFAR's python version: subsets are read, and nothing in the files is executed."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from app.errors import DataError
from training import data
from training.datasets import cifar


class Forged:
    """Unpickled without restriction, it writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


def batch(key: bytes, count: int = 4) -> bytes:
    pixels = np.arange(count, dtype=np.uint8)[:, None].repeat(3072, 1)
    return pickle.dumps({b"data": pixels, key: [i % 2 for i in range(count)]})


@pytest.fixture
def cifar100(tmp_path: Path) -> Path:
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    (folder / "meta").write_bytes(pickle.dumps({b"fine_label_names": [b"cat", b"dog", b"fox"]}))
    for part in ("train", "test"):
        (folder / part).write_bytes(batch(b"fine_labels"))
    return tmp_path


def test_subset_of_cifar_100_is_read(cifar100: Path) -> None:
    for path in (cifar100, cifar100 / "cifar-100-python"):
        dataset = data.load(path, 32)
        assert (dataset.name, dataset.classes) == ("CIFAR-100", ["cat", "dog"])
        assert dataset.train.images[:, 0, 0, 0].tolist() == [0, 1, 2, 3]
        assert dataset.notes == ["1 class without pictures left out: fox"]
    assert data.load(cifar100, 24).train.images.shape == (4, 24, 24, 3)


def test_subset_of_cifar_10_is_read(tmp_path: Path) -> None:
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": ["cat", "dog"]}))
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        (folder / name).write_bytes(batch(b"labels"))
    dataset = data.load(tmp_path, 32)
    assert (len(dataset.train), len(dataset.test)) == (20, 4)
    (folder / "data_batch_3").unlink()
    with pytest.raises(DataError, match=r"data_batch_3 is missing; --dataset cifar10 --download completes"):
        data.load(tmp_path, 32)


def test_forged_file_is_refused_and_not_executed(cifar100: Path) -> None:
    (cifar100 / "cifar-100-python" / "train").write_bytes(pickle.dumps(Forged(cifar100 / "touched")))
    with pytest.raises(DataError, match=r"cannot be read as a CIFAR file: it refers to pathlib"):
        cifar.read(cifar100)
    assert not (cifar100 / "touched").exists()


@pytest.mark.parametrize("content", [b"", b"\x80\x04", pickle.dumps({b"data": 1}), pickle.dumps([1])])
def test_broken_file_gives_one_line(cifar100: Path, content: bytes) -> None:
    (cifar100 / "cifar-100-python" / "train").write_bytes(content)
    with pytest.raises(DataError, match=r"cannot be read as a CIFAR file|does not have the content of CIFAR-100"):
        cifar.read(cifar100)
