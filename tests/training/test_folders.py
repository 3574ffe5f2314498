"""Other people's folders: any number of classes, pictures of any size and kind, trained and served as they are."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from app.settings import Settings
from tests.conftest import serving
from training import train

MODES = (("RGB", "png"), ("L", "png"), ("RGBA", "png"), ("RGB", "jpg"), ("L", "jpg"))


def generate(root: Path, classes: int, train_images: int, test_images: int) -> list[str]:
    """Noise in all modes and shapes; gives the classes' names in order."""
    chance = np.random.default_rng(0)
    names = [f"class {i:04d} é" for i in range(classes)]
    for part, count in (("train", train_images), ("test", test_images)):
        for label, name in enumerate(names):
            folder = root / part / name
            folder.mkdir(parents=True)
            for i in range(count):
                mode, ending = MODES[(label + i) % len(MODES)]
                width, height = chance.integers(5, 60, 2)
                noise = chance.integers(0, 256, (height, width, 4), dtype=np.uint8)
                Image.fromarray(noise).convert(mode).save(folder / f"{i}.{ending}")
    return names


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("classes", "train_images", "test_images", "flags"),
    [(2, 4, 1, ["--holdout", "0.25", "--image-size", "40"]), (1000, 2, 1, ["--holdout", "0.5", "--batch-size", "500"])],
)
def test_a_folder_is_trained_on_and_served(
    tmp_path: Path, classes: int, train_images: int, test_images: int, flags: list[str]
) -> None:
    names, out = generate(tmp_path / "data", classes, train_images, test_images), tmp_path / "x.safetensors"
    common = ["--data", str(tmp_path / "data"), "--out", str(out), "--run-dir", str(tmp_path / "run")]
    train.main([*common, "--widths", "8,8,8", "--epochs", "1", *flags])
    assert (tmp_path / "run" / "report.md").exists()
    pictures = [path for name in names[:2] for path in (tmp_path / "data" / "test" / name).iterdir()]
    with serving(Settings(weights=out, max_batch=2)) as client:
        assert client.get("/model").json()["classes"] == names
        files = [("file", (path.name, path.read_bytes())) for path in pictures]
        predictions = client.post("/predict", files=files).json()["predictions"]
        assert [len(prediction["top"]) for prediction in predictions] == [min(3, classes)] * 2
        everything = client.post(f"/predict?top_k={classes}", files=files[:1]).json()["predictions"][0]
        assert {entry["label"] for entry in everything["top"]} == set(names)


def test_a_folder_without_test_pictures_trains_when_asked_to(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    generate(tmp_path / "data", 2, 4, 0)
    (tmp_path / "data" / "test").rename(tmp_path / "data" / "other")
    flags = ["--data", str(tmp_path / "data"), "--out", str(tmp_path / "x.safetensors"), "--run-dir", str(tmp_path)]
    with pytest.raises(SystemExit, match="test is missing; --skip-test trains without test pictures"):
        train.main(flags)
    train.main([*flags, "--widths", "8,8,8", "--epochs", "1", "--skip-test"])
    assert "held-out accuracy" in capsys.readouterr().out
