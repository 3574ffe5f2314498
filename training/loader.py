"""Augmented batches whose content depends on (seed, epoch, step, rank) only: a run can resume at any step."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from app.errors import DataError
from training import augment
from training.data import Split
from training.distillation import Teacher
from training.recipe import Recipe

CPU = torch.device("cpu")


class Batch(NamedTuple):
    """Augmented images uint8 [N, S, S, 3], labels int64 [N], and a teacher's targets float32 [N, classes] or None."""

    images: Tensor
    labels: Tensor
    targets: Tensor | None


class Loader:
    """Shuffles per epoch, cuts the order into batches, and each batch into one part per process.

    A split smaller than a batch gives one batch of all its images. Raises DataError for fewer images than processes.
    """

    def __init__(
        self,
        split: Split,
        recipe: Recipe,
        rank: int = 0,
        world_size: int = 1,
        teacher: Teacher | None = None,
        device: torch.device = CPU,
        classes: int = 0,
    ) -> None:
        """Images and labels are kept, augmented and yielded on the device.

        `classes` is the number of the network's classes, of which the last ones may have no images.
        """
        self.split = split
        self.teacher = teacher
        self.recipe = recipe
        self.rank = rank
        # Weighted by these, every class has the same share in the loss; the mean weight of an image is 1.
        counts = torch.bincount(split.labels, minlength=classes)
        self.class_weights = len(split) / (counts.count_nonzero() * counts.clamp_min(1))  # float32 [classes]
        # Every process has the same number of images, as averaged gradients assume.
        self.local_batch_size = max(1, min(recipe.batch_size, len(split)) // world_size)
        self.batch_size = self.local_batch_size * world_size
        self.steps_per_epoch = len(split) // self.batch_size
        if not self.steps_per_epoch:
            raise DataError(f"{len(split)} training images are too few for {world_size} processes.")
        # Padded once for all epochs; a crop then is an indexing operation.
        self._padded = augment.pad(split.images, recipe.random_crop_padding).to(device)
        self._labels = split.labels.to(device)
        # Cutout with the mean colour: after normalisation the square is 0.
        self._mean_colour = augment.mean_colour(split.images).to(device)

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        """The batches of an epoch from `first_step` on. Images left over after the last full batch are skipped."""
        recipe, count = self.recipe, len(self.split)
        # All processes draw the same order and flips, and take disjoint slices of it.
        order = torch.randperm(count, generator=_generator(recipe.seed, epoch))
        flips = augment.alternate_flips(count, epoch, recipe.seed)
        for step in range(first_step, self.steps_per_epoch):
            start = step * self.batch_size + self.rank * self.local_batch_size
            index = order[start : start + self.local_batch_size]  # int64 [local batch]
            # A generator per step and process: skipping steps on resume does not shift later random numbers.
            generator = _generator(recipe.seed, epoch, step, self.rank)
            images = augment.crop(self._padded, index, recipe.image_size, flips[index] & recipe.hflip, generator)
            if recipe.mixup:  # before cutout, so that the square stays empty
                images = augment.mixup(images, self._mixup_partners(generator), recipe.mixup, generator)
            images = augment.cutout(images, recipe.cutout, self._mean_colour, generator)
            # The teacher gets the image before JPEG: the student learns the clean image's targets for the lossy one.
            targets = self.teacher(index, images) if self.teacher else None
            images = augment.random_jpeg(images, recipe.jpeg_prob, recipe.jpeg_quality, generator)
            yield Batch(images, self._labels[augment.upload(index, self._labels.device)], targets)

    def _mixup_partners(self, generator: torch.Generator) -> Tensor:
        """Randomly chosen, cropped and flipped training images uint8 [local batch, S, S, 3]."""
        index = torch.randint(len(self.split), (self.local_batch_size,), generator=generator)
        # Partners do not alternate: they are drawn with replacement, so there are no pairs of epochs to balance.
        flipped = torch.rand(self.local_batch_size, generator=generator) < 0.5
        return augment.crop(self._padded, index, self.recipe.image_size, flipped & self.recipe.hflip, generator)


def _generator(*numbers: int) -> torch.Generator:
    """A generator whose seed depends on all the numbers and on their count."""
    seed = len(numbers)
    for number in numbers:
        seed = seed * 1_000_003 + number  # a prime above any epoch, step or rank: nearby tuples differ
    return torch.Generator().manual_seed(seed % 2**63)
