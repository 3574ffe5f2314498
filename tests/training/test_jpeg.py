"""JPEG by arithmetic beside Pillow's, at several qualities and sizes."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from tests.conftest import EXAMPLES
from training import augment, jpeg


def photographs(size: int) -> Tensor:
    images = [Image.open(path).convert("RGB").resize((size, size)) for path in sorted(EXAMPLES.glob("*.png"))]
    return torch.from_numpy(np.stack([np.asarray(image) for image in images]))


@pytest.mark.parametrize("size", [32, 28, 64])
@pytest.mark.parametrize("quality", [30, 75, 90, 100])
def test_result_is_close_to_that_of_libjpeg(size: int, quality: int) -> None:
    images = photographs(size)
    ours = jpeg.roundtrip(images, torch.full((len(images),), quality))
    theirs = augment.lossy_roundtrip_batch(images, quality)
    difference = (ours.int() - theirs.int()).float()
    assert difference.abs().mean() < 1.3  # of 255 levels; JPEG itself changes 2 to 10
    assert (difference.mean((0, 1, 2)).abs() < 0.5).all()


@pytest.mark.parametrize("quality", [30, 90])
def test_grey_is_close_to_that_of_libjpeg(quality: int) -> None:
    """Without chroma the only differences are those of rounding."""
    images = photographs(32).float().mean(-1, keepdim=True).round().to(torch.uint8).repeat(1, 1, 1, 3)
    ours = jpeg.roundtrip(images, torch.full((len(images),), quality))
    assert (ours.int() - augment.lossy_roundtrip_batch(images, quality).int()).abs().float().mean() < 0.4


def test_each_image_has_its_own_quality() -> None:
    images = photographs(32)
    quality = torch.arange(len(images)) * 7 + 20
    together = jpeg.roundtrip(images, quality)
    for i in range(len(images)):
        assert torch.equal(together[i], jpeg.roundtrip(images[i : i + 1], quality[i : i + 1])[0])


def test_flat_colours_stay_within_rounding() -> None:
    colours = torch.tensor([[0, 0, 0], [255, 255, 255], [200, 30, 90], [17, 250, 128]], dtype=torch.uint8)
    images = colours[:, None, None].expand(4, 16, 16, 3)
    assert (jpeg.roundtrip(images, torch.full((4,), 95)).int() - images.int()).abs().max() <= 4
