"""Folders of any number of classes, with images of any size and format, are trained on and served."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from app.settings import Settings
from tests.conftest import serving
from training import train

MODES = (("RGB", "png"), ("L", "png"), ("RGBA", "png"), ("RGB", "jpg"), ("L", "jpg"))


def generate(root: Path, classes: int, train_images: int, test_images: int) -> list[str]:
    """Writes noise in several modes and shapes; returns the class names in order."""
    generator = np.random.default_rng(0)
    names = [f"class {i:04d} é" for i in range(classes)]
    for split, count in (("train", train_images), ("test", test_images)):
        for label, name in enumerate(names):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                mode, suffix = MODES[(label + i) % len(MODES)]
                width, height = generator.integers(5, 60, 2)
                noise = generator.integers(0, 256, (height, width, 4), dtype=np.uint8)
                Image.fromarray(noise).convert(mode).save(folder / f"{i}.{suffix}")
    return names


@pytest.mark.slow
@pytest.mark.parametrize(
    ("classes", "train_images", "flags"),
    [
        (2, 4, ["--val-fraction", "0.25", "--image-size", "40"]),
        (500, 2, ["--val-fraction", "0.5", "--batch-size", "250", "--image-size", "16", "--cutout", "4"]),
    ],
)
def test_folder_is_trained_on_and_served(tmp_path: Path, classes: int, train_images: int, flags: list[str]) -> None:
    names, out = generate(tmp_path / "data", classes, train_images, 1), tmp_path / "x.safetensors"
    common = ["--data", str(tmp_path / "data"), "--out", str(out), "--run-dir", str(tmp_path / "run")]
    train.main([*common, "--widths", "8,8,8", "--epochs", "1", *flags])
    assert (tmp_path / "run" / "report.md").exists()
    images = [path for name in names[:2] for path in (tmp_path / "data" / "test" / name).iterdir()]
    with serving(Settings(weights=out, max_batch=2)) as client:
        assert client.get("/model").json()["classes"] == names
        files = [("file", (path.name, path.read_bytes())) for path in images]
        predictions = client.post("/predict", files=files).json()["predictions"]
        assert [len(prediction["top"]) for prediction in predictions] == [min(3, classes)] * 2
        ranking = client.post(f"/predict?top_k={classes}", files=files[:1]).json()["predictions"][0]
        assert {entry["label"] for entry in ranking["top"]} == set(names)


@pytest.mark.slow
@pytest.mark.parametrize(("val", "expected"), [(None, "test accuracy"), ("val", "validation accuracy")])
def test_folder_without_test_part_is_trained_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], val: str | None, expected: str
) -> None:
    """Without any held-out part a share is held out; with val/ the report is on it."""
    generate(tmp_path / "data", 2, 6, 2)
    (tmp_path / "data" / "test").rename(tmp_path / "data" / val if val else tmp_path / "other")
    flags = ["--data", str(tmp_path / "data"), "--out", str(tmp_path / "x.safetensors"), "--run-dir", str(tmp_path)]
    train.main([*flags, "--widths", "8,8,8", "--epochs", "1"])
    printed = capsys.readouterr().out
    assert expected in printed
    assert ("held out for the test" in printed) == (val is None)
