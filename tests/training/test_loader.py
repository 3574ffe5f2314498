from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from app.errors import DataError
from training.data import Split
from training.loader import Batches
from training.recipe import Recipe


def numbered(count: int) -> Split:
    """Every image has the same pixels, and a label of its own."""
    image = torch.randint(0, 256, (1, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return Split(image.expand(count, -1, -1, -1).contiguous(), torch.arange(count))


def test_processes_share_out_the_batches_of_one() -> None:
    recipe, split = Recipe(batch_size=8), numbered(40)
    alone = list(Batches(split, recipe).epoch(3))
    shares = [list(Batches(split, recipe, rank, 4).epoch(3)) for rank in range(4)]
    for whole, *parts in zip(alone, *shares, strict=True):
        assert [len(part.labels) for part in parts] == [2] * 4
        assert torch.equal(whole.labels, torch.cat([part.labels for part in parts]))
    assert torch.cat([batch.labels for batch in alone]).sort().values.tolist() == list(range(40))


def test_processes_augment_in_ways_of_their_own() -> None:
    recipe, split = Recipe(batch_size=32, flip=False, translate=4, jpeg=0), numbered(32)
    first, second = (next(Batches(split, recipe, rank, 2).epoch(0)).images for rank in range(2))
    assert not torch.equal(first, second)


def test_fewer_images_than_a_batch_are_one_batch() -> None:
    batches = Batches(numbered(5), Recipe(batch_size=1000))
    assert batches.per_epoch == 1
    assert next(batches.epoch(0)).labels.sort().values.tolist() == list(range(5))


def test_fewer_images_than_processes_are_refused() -> None:
    with pytest.raises(DataError, match="3 training images cannot be shared out among 4 processes"):
        Batches(numbered(3), Recipe(), 0, 4)


class Scribe(NamedTuple):
    """A teacher that answers with what it was shown."""

    name: str = "scribe"

    def __call__(self, index: Tensor, images: Tensor) -> Tensor:
        return torch.cat([index[:, None].float(), images.flatten(1).float()], 1)


def test_a_teacher_sees_what_is_blended_before_it_becomes_jpeg() -> None:
    split = numbered(40)
    images = split.images.clone()
    images[20:] = 255 - images[20:]
    recipe = Recipe(batch_size=40, blend=1, cutout=0, translate=0, flip=False, jpeg=0)
    (plain,) = Batches(Split(images, split.labels), recipe, teacher=Scribe()).epoch(0)
    (lossy,) = Batches(Split(images, split.labels), replace(recipe, jpeg=1), teacher=Scribe()).epoch(0)
    assert plain.targets is not None
    assert torch.equal(plain.targets[:, 0].long(), plain.labels)
    assert torch.equal(plain.targets[:, 1:], plain.images.flatten(1).float())
    assert lossy.targets is not None
    assert torch.equal(lossy.targets, plain.targets)
    assert not torch.equal(lossy.images, plain.images)
    assert not torch.equal(plain.images, images[plain.labels])
