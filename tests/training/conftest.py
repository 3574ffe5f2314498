"""A small image folder whose classes differ in brightness, so that a few steps learn it."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.conftest import EXAMPLES


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small tensors gain nothing from a second thread, and wait for it on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes in the form DIR/train/<class>/*, DIR/test/<class>/*; one file is not an image."""
    root = tmp_path_factory.mktemp("data") / "shades"
    generator = np.random.default_rng(0)
    base = np.asarray(Image.open(EXAMPLES / "cat.png"), dtype=float)
    for part, count in (("train", 40), ("test", 10)):
        for label, brightness in (("bright", 1.5), ("dim", 0.3), ("middling", 0.8)):
            target = root / part / label
            target.mkdir(parents=True)
            for i in range(count):
                noisy = base * brightness + generator.normal(0, 8, base.shape)
                Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(target / f"{i}.png")
    (root / "train" / "dim" / "notes.txt").write_text("not an image")
    (root / "train" / "dim" / ".hidden").write_text("ignored")
    return root
