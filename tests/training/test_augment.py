import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tests.conftest import EXAMPLES
from training import augment


def pictures(count: int = 6) -> torch.Tensor:
    names = ["cat", "dog", "frog", "ship", "truck", "bird"]
    return torch.stack([torch.from_numpy(np.array(Image.open(EXAMPLES / f"{name}.png"))) for name in names[:count]])


def test_many_images_are_padded_and_averaged_as_one() -> None:
    count = 2 * augment.PART + 5
    images = torch.randint(0, 256, (count, 5, 4, 3), dtype=torch.uint8, generator=generator())
    padded = augment.pad(images, 2)
    assert np.array_equal(padded, np.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0)), "reflect"))
    assert padded.is_contiguous()
    assert torch.equal(augment.mean_colour(images), images.reshape(-1, 3).double().mean(0).round().to(torch.uint8))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_padding_reflects_without_repeating_the_edge() -> None:
    images = pictures()
    padded = augment.pad(images, 2)
    assert padded.shape == (6, 36, 36, 3)
    assert torch.equal(padded[:, 2:34, 2:34], images)
    assert torch.equal(padded[:, 1, 2:34], images[:, 1])
    assert torch.equal(padded[:, 0, 2:34], images[:, 2])
    assert augment.pad(images, 0) is images


@given(margin=st.integers(0, 4), seed=st.integers(0, 1000))
def test_crop_is_a_window_of_the_padded_image(margin: int, seed: int) -> None:
    images = pictures(2)
    padded = augment.pad(images, margin)
    index = torch.tensor([1, 0, 1])
    cropped = augment.crop(padded, index, 32, torch.tensor([False, True, False]), generator(seed))
    assert cropped.shape == (3, 32, 32, 3)
    assert cropped.dtype == torch.uint8
    for crop, i, flipped in zip(cropped, index, (False, True, False), strict=True):
        crop = crop.flip(1) if flipped else crop
        windows = (padded[i][y : y + 32, x : x + 32] for y in range(2 * margin + 1) for x in range(2 * margin + 1))
        assert any(torch.equal(crop, window) for window in windows)


def test_two_epochs_flip_each_image_once() -> None:
    first, second, third = (augment.alternate_flips(1000, epoch, seed=3) for epoch in range(3))
    assert (first ^ second).all()
    assert torch.equal(first, third)
    assert 400 < first.sum() < 600


def test_mixup_keeps_at_least_half_of_the_image() -> None:
    images, partners = torch.zeros(400, 4, 4, 3, dtype=torch.uint8), torch.full((400, 4, 4, 3), 200, dtype=torch.uint8)
    out = augment.mixup(images, partners, 0.75, generator())
    assert out.dtype == torch.uint8
    assert (out == out[:, :1, :1, :1]).all()  # one weight for all pixels of an image
    blended = out[:, 0, 0, 0]
    assert 80 < (blended == 0).sum() < 120
    assert 90 < blended.max() <= 100


@given(side=st.integers(1, 32), seed=st.integers(0, 1000))
def test_cutout_covers_exactly_one_square(side: int, seed: int) -> None:
    images, fill = torch.zeros(4, 32, 32, 3, dtype=torch.uint8), torch.tensor([9, 9, 9], dtype=torch.uint8)
    covered = augment.cutout(images, side, fill, generator(seed))[..., 0] == 9
    assert (covered.sum((1, 2)) == side * side).all()
    assert (covered.any(2).sum(1) == side).all()
    assert torch.equal(augment.cutout(images, 0, fill, generator(seed)), images)


def test_random_jpeg_changes_the_given_share() -> None:
    images = pictures().repeat(50, 1, 1, 1)
    out = augment.random_jpeg(images, 0.5, (50, 95), generator())
    changed = (out != images).flatten(1).any(1)
    assert 100 < changed.sum() < 200
    assert (out.int() - images.int()).abs().float().mean() < 10
    assert augment.random_jpeg(images, 0, (50, 95), generator()) is images


@pytest.mark.parametrize("image_format", ["JPEG", "WEBP"])
def test_lower_quality_loses_more(image_format: str) -> None:
    image = pictures(1)[0]
    losses = [
        (augment.lossy_roundtrip(image, q, image_format).int() - image.int()).abs().float().mean()
        for q in (95, 80, 50, 20)
    ]
    assert losses == sorted(losses)
    assert losses[0] > 0
