"""Training runs that take well under a second: small tensors, small networks, and the flags for the command line."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

from training import train
from training.data import Split
from training.distillation import Teacher
from training.loader import Loader
from training.recipe import Recipe
from training.trainer import Trainer

SMALL_FLAGS = ["--widths", "8,8,8", "--depth", "2", "--random-crop-padding", "2", "--epochs", "8", "--batch-size", "30"]
SMALL_FLAGS += ["--val-fraction", "0.2", "--muon-lr", "0.05", "--image-size", "16", "--cutout", "4"]

SMALL_RECIPE = Recipe(
    widths=(8, 8, 8), depth=2, random_crop_padding=1, cutout=0, image_size=12, epochs=4, batch_size=20, muon_lr=0.05
)


def shades(count: int, size: int = 12, seed: int = 0) -> Split:
    """Noise of three brightnesses, which are the classes; images uint8 [count, size, size, 3]."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    noise = torch.randint(0, 80, (count, size, size, 3), generator=generator)
    return Split((noise + 80 * labels[:, None, None, None]).to(torch.uint8), labels)


def small_trainer(
    recipe: Recipe = SMALL_RECIPE, train_split: Split | None = None, teacher: Teacher | None = None
) -> Trainer:
    """A trainer of a new network; three steps an epoch with the default recipe and split."""
    split = train_split or shades(60)
    network = train.build_network(recipe, split, 3)
    return Trainer(network, recipe, Loader(split, recipe, teacher=teacher), torch.device("cpu"))


def state(trainer: Trainer) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in trainer.network.state_dict().items()}


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Whether two states are the same, bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def fit(folder: Path, tmp: Path, *flags: str) -> Path:
    """Runs `training.train` in this process; returns the weights file. The run's folder is tmp/run."""
    out = tmp / "shades.safetensors"
    train.main(["--data", str(folder), "--out", str(out), "--run-dir", str(tmp / "run"), *SMALL_FLAGS, *flags])
    return out


def cli_error(folder: Path, tmp: Path, *flags: str) -> tuple[int, str]:
    """(exit code, message) of a run that must fail with one line; the message is on stderr for code 2."""
    with pytest.raises(SystemExit) as exit_info:
        fit(folder, tmp, *flags)
    code = exit_info.value.code
    return (code, "") if isinstance(code, int) else (1, str(code))


@contextmanager
def full_disk(limit: int) -> Iterator[None]:
    """No file grows beyond so many bytes: as a full disk, but with another error number."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
