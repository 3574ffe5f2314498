"""A small image folder of real pictures with brightness that tells the classes apart, so that it is learnt at once."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.conftest import EXAMPLES


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes in the form DIR/train/<class>/*, DIR/test/<class>/*; one file is no picture."""
    root = tmp_path_factory.mktemp("data") / "shades"
    chance = np.random.default_rng(0)
    base = np.asarray(Image.open(EXAMPLES / "cat.png"), dtype=float)
    for part, count in (("train", 40), ("test", 10)):
        for label, brightness in (("bright", 1.5), ("dim", 0.3), ("middling", 0.8)):
            target = root / part / label
            target.mkdir(parents=True)
            for i in range(count):
                noisy = base * brightness + chance.normal(0, 8, base.shape)
                Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(target / f"{i}.png")
    (root / "train" / "dim" / "notes.txt").write_text("not a picture")
    (root / "train" / "dim" / ".hidden").write_text("not looked at")
    return root
