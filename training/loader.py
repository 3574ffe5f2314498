"""Augmented batches in an order that depends on seed and step only, so that a run can go on at any step."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from app.errors import DataError
from training import augment
from training.data import Split
from training.distillation import Teacher
from training.recipe import Recipe


class Batch(NamedTuple):
    """Images uint8 [N, S, S, 3], augmented; labels int64 [N]; a teacher's answers float32 [N, classes], if any."""

    images: Tensor
    labels: Tensor
    targets: Tensor | None


class Batches:
    """Cuts every epoch's shuffle into batches, and each batch into one share a process.

    Fewer images than a batch make one batch of all. Raises DataError where there are fewer images than processes.
    """

    def __init__(
        self, split: Split, recipe: Recipe, rank: int = 0, world: int = 1, teacher: Teacher | None = None
    ) -> None:
        self.split = split
        self.teacher = teacher
        self.recipe = recipe
        self.rank = rank
        self.share = max(1, min(recipe.batch_size, len(split)) // world)  # images of this process in a batch
        self.batch_size = self.share * world
        self.per_epoch = len(split) // self.batch_size
        if not self.per_epoch:
            raise DataError(f"{len(split)} training images cannot be shared out among {world} processes.")
        self._padded = augment.pad(split.images, recipe.translate)
        self._fill = split.images.reshape(-1, 3).float().mean(0).round().to(torch.uint8)

    def epoch(self, number: int, first: int = 0) -> Iterator[Batch]:
        """The batches of an epoch from number `first` on; the few images left over wait for the next shuffle."""
        recipe, count = self.recipe, len(self.split)
        order = torch.randperm(count, generator=_generator(recipe.seed, number))
        flips = augment.alternate_flips(count, number, recipe.seed)
        for i in range(first, self.per_epoch):
            begin = i * self.batch_size + self.rank * self.share
            index = order[begin : begin + self.share]
            chance = _generator(recipe.seed, number, i, self.rank)
            images = augment.crop(self._padded, index, recipe.image_size, flips[index] & recipe.flip, chance)
            if recipe.blend:
                images = augment.blend(images, self._others(chance), recipe.blend, chance)
            images = augment.cutout(images, recipe.cutout, self._fill, chance)
            targets = self.teacher(index, images) if self.teacher else None
            images = augment.recompress(images, recipe.jpeg, recipe.jpeg_quality, chance)
            yield Batch(images, self.split.labels[index], targets)

    def _others(self, chance: torch.Generator) -> Tensor:
        """As many images of the set as a share has, cut and mirrored at random."""
        index = torch.randint(len(self.split), (self.share,), generator=chance)
        mirrored = torch.rand(self.share, generator=chance) < 0.5
        return augment.crop(self._padded, index, self.recipe.image_size, mirrored & self.recipe.flip, chance)


def _generator(*numbers: int) -> torch.Generator:
    """Seeded by several small numbers."""
    seed = len(numbers)
    for number in numbers:
        seed = seed * 1_000_003 + number
    return torch.Generator().manual_seed(seed % 2**63)
