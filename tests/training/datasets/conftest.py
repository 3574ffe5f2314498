"""Small pictures of two classes, written in the forms that the readers accept."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

Writer = Callable[..., None]


@pytest.fixture
def write() -> Writer:
    """Writes `count` pictures of random pixels into a folder, as <i>.<suffix>."""
    generator = np.random.default_rng(0)

    def into(folder: Path, count: int = 6, suffix: str = "png") -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for i in range(count):
            pixels = generator.integers(0, 256, (20, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{i}.{suffix}")

    return into
