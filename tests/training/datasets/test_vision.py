"""torchvision's sets by name, and their folders without it. Nothing is downloaded."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from app.errors import DataError
from tests.training.datasets.conftest import Writer
from training import data
from training.datasets import vision
from training.datasets.discovery import open_listing


def write_mnist(root: Path, name: str = "MNIST") -> None:
    raw = root / name / "raw"
    raw.mkdir(parents=True)
    for part in ("train", "t10k"):
        images = np.arange(6, dtype=np.uint8)[:, None, None].repeat(28, 1).repeat(28, 2)
        head = (0x803).to_bytes(4, "big") + (6).to_bytes(4, "big") + (28).to_bytes(4, "big") * 2
        (raw / f"{part}-images-idx3-ubyte").write_bytes(head + images.tobytes())
        head = (0x801).to_bytes(4, "big") + (6).to_bytes(4, "big")
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(head + bytes([0, 1, 2] * 2))


@pytest.mark.parametrize("folder", ["MNIST", "FashionMNIST", "KMNIST"])
def test_idx_files_are_recognised(tmp_path: Path, folder: str) -> None:
    write_mnist(tmp_path, folder)
    dataset = data.load(tmp_path, 28)
    assert (dataset.name, len(dataset.classes)) == (folder.lower(), 3)
    assert dataset.train.images[:, 0, 0, 0].tolist() == list(range(6))
    assert dataset.train.labels.tolist() == [0, 1, 2] * 2
    with open_listing(tmp_path, folder.lower()) as listing:
        assert len(listing.parts["test"]) == 6


def test_gtsrb_is_read_by_name_and_by_its_folder(tmp_path: Path, write: Writer) -> None:
    training = tmp_path / "gtsrb" / "GTSRB" / "Training"
    for name in ("00000", "00001"):
        write(training / name, 3, "ppm")
    test = tmp_path / "gtsrb" / "GTSRB" / "Final_Test" / "Images"
    write(test, 2, "ppm")
    (tmp_path / "gtsrb" / "GT-final_test.csv").write_text("Filename;ClassId\n0.ppm;0\n1.ppm;1\n")
    for selection in (data.Selection(), data.Selection("gtsrb")):
        dataset = data.load(tmp_path, 16, selection=selection)
        assert dataset.classes == ["0", "1"]
        assert (len(dataset.train), len(dataset.test)) == (6, 2)


def test_missing_set_names_the_flag_that_downloads_it(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"does not hold svhn \(.*\); --dataset svhn --download downloads"):
        data.load(tmp_path, 32, selection=data.Selection("svhn"))
    for name in vision.SETS:
        with pytest.raises(DataError, match=f"does not hold {name} "):
            vision.read(name, tmp_path)


def test_class_names_and_labels_come_from_the_set() -> None:
    class Pairs:
        categories = (("a", "b"), ("c",))
        _samples = (("x", 1), ("y", 0))

        def __getitem__(self, index: int) -> tuple[Image.Image, int]:
            return Image.new("RGB", (8, 8)), self._samples[index][1]

    listing = vision._listing("pairs", {"train": Pairs()})
    assert listing.classes == ["a, b", "c"]
    assert [item.label for item in listing.parts["train"]] == ["c", "a, b"]


def test_svhn_matlab_files_are_recognised(tmp_path: Path) -> None:
    assert vision.recognise(tmp_path) is None
    savemat(tmp_path / "train_32x32.mat", {"X": np.zeros((32, 32, 3, 2), np.uint8), "y": np.array([[1], [10]])})
    assert vision.recognise(tmp_path) == "svhn"
