"""Images for the engines: noise, and pictures that a trained network recognises."""

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from benchmarks.server_process import ROOT

Images = NDArray[np.uint8]


def noise(count: int = 256, size: int = 32) -> Images:
    """Images uint8 [count, size, size, 3]."""
    return np.random.default_rng(0).integers(0, 256, (count, size, size, 3), np.uint8)


def pictures(count: int) -> Images:
    """The examples repeated, uint8 [count, 32, 32, 3]: a cascade classifies them as those of the test set."""
    paths = sorted((ROOT / "examples").glob("*.png"))
    images = [np.asarray(Image.open(path).convert("RGB").resize((32, 32))) for path in paths]
    return np.stack([images[i % len(images)] for i in range(count)])
