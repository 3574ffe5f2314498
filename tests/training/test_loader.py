import hashlib
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from app.errors import DataError
from training.data import Split
from training.loader import Loader
from training.recipe import Recipe


def numbered(count: int) -> Split:
    """Images of the same pixels, each with its own label."""
    image = torch.randint(0, 256, (1, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return Split(image.expand(count, -1, -1, -1).contiguous(), torch.arange(count))


def test_batches_are_those_of_earlier_versions() -> None:
    """Choices and pixels of a seed must not change: a resumed run continues with them."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (40, 32, 32, 3), dtype=torch.uint8, generator=generator)
    digest = hashlib.sha256()
    for changes in ({}, {"cutout": 0, "random_crop_padding": 2, "hflip": False}):
        for epoch in (0, 1):
            for batch in Loader(Split(images, torch.arange(40)), Recipe(batch_size=16, **changes)).epoch(epoch):
                digest.update(batch.images.numpy().tobytes() + batch.labels.numpy().tobytes())
    assert digest.hexdigest() == "17b1775e71450f1ec0e161e3bb127df1d5a86b5324862044feb6f560aa1e0116"


def test_processes_split_each_batch() -> None:
    recipe, split = Recipe(batch_size=8), numbered(40)
    single = list(Loader(split, recipe).epoch(3))
    parts = [list(Loader(split, recipe, rank, 4).epoch(3)) for rank in range(4)]
    for whole, *local in zip(single, *parts, strict=True):
        assert [len(part.labels) for part in local] == [2] * 4
        assert torch.equal(whole.labels, torch.cat([part.labels for part in local]))
    assert torch.cat([batch.labels for batch in single]).sort().values.tolist() == list(range(40))


def test_processes_augment_differently() -> None:
    recipe, split = Recipe(batch_size=32, hflip=False, random_crop_padding=4, jpeg_prob=0), numbered(32)
    first, second = (next(Loader(split, recipe, rank, 2).epoch(0)).images for rank in range(2))
    assert not torch.equal(first, second)


def test_small_split_is_one_batch() -> None:
    loader = Loader(numbered(5), Recipe(batch_size=1000))
    assert loader.steps_per_epoch == 1
    assert next(loader.epoch(0)).labels.sort().values.tolist() == list(range(5))


def test_fewer_images_than_processes_are_rejected() -> None:
    with pytest.raises(DataError, match="3 training images are too few for 4 processes"):
        Loader(numbered(3), Recipe(), 0, 4)


class Echo(NamedTuple):
    """A teacher whose targets are its inputs."""

    name: str = "echo"

    def __call__(self, index: Tensor, images: Tensor) -> Tensor:
        return torch.cat([index[:, None].float(), images.flatten(1).float()], 1)


def test_teacher_sees_mixup_but_not_jpeg() -> None:
    split = numbered(40)
    images = split.images.clone()
    images[20:] = 255 - images[20:]
    recipe = Recipe(
        batch_size=40, mixup=1, cutout=0, random_crop_padding=0, hflip=False, teacher="echo", online_teacher=True
    )
    lossy_recipe = recipe.model_copy(update={"jpeg_prob": 1.0})
    (plain,) = Loader(Split(images, split.labels), recipe, teacher=Echo()).epoch(0)
    (lossy,) = Loader(Split(images, split.labels), lossy_recipe, teacher=Echo()).epoch(0)
    assert plain.targets is not None
    assert torch.equal(plain.targets[:, 0].long(), plain.labels)
    assert torch.equal(plain.targets[:, 1:], plain.images.flatten(1).float())
    assert lossy.targets is not None
    assert torch.equal(lossy.targets, plain.targets)
    assert not torch.equal(lossy.images, plain.images)
    assert not torch.equal(plain.images, images[plain.labels])


def test_class_weights_give_equal_shares() -> None:
    labels = torch.tensor([0] * 30 + [1] * 10)
    loader = Loader(Split(torch.zeros(40, 12, 12, 3, dtype=torch.uint8), labels), Recipe(image_size=12, cutout=0))
    assert loader.class_weights.tolist() == pytest.approx([2 / 3, 2])
    assert loader.class_weights[labels].mean().item() == pytest.approx(1)
    split = Split(torch.zeros(40, 12, 12, 3, dtype=torch.uint8), labels)
    longer = Loader(split, Recipe(image_size=12, cutout=0), classes=3)
    assert longer.class_weights[:2].tolist() == loader.class_weights.tolist()
    assert len(longer.class_weights) == 3  # as many as the network's classes
