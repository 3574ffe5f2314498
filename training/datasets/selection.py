"""Which data a command reads, as flags."""

import argparse
from pathlib import Path
from typing import NamedTuple

from training.datasets import vision

TEST_FRACTION = 0.2  # of data without a test part
SPLIT_SEED = 0  # fixed, so that every run and `evaluate` see the same test images


class Selection(NamedTuple):
    """A torchvision set by name, and how a test part is held out of data without one."""

    dataset: str = ""
    test_fraction: float = TEST_FRACTION
    split_seed: int = SPLIT_SEED


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that `from_flags` reads."""
    add = add_source_flags(parser).add_argument
    add("--test-fraction", type=share, default=TEST_FRACTION, metavar="FLOAT",
        help="share of each class that is held out of data without a test part, 0 to 1 [%(default)s]")  # fmt: skip
    add("--split-seed", type=_seed, default=SPLIT_SEED, metavar="INT",
        help="seed of that choice; keep it for evaluate [%(default)s]")  # fmt: skip


def add_source_flags(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """--data and --dataset; returns their group."""
    group = parser.add_argument_group("data")
    add = group.add_argument
    add("--data", type=Path, required=True, metavar="DIR",
        help="train/<class>/* with test/ or val/, a folder of classes, a CSV, .npz, parquet, a zip of these, or a "
        "torchvision folder")  # fmt: skip
    add("--dataset", choices=sorted(vision.SETS), default="", metavar="NAME",
        help=f"torchvision set in --data: {', '.join(sorted(vision.SETS))}")  # fmt: skip
    return group


def from_flags(arguments: argparse.Namespace) -> Selection:
    return Selection(arguments.dataset, arguments.test_fraction, arguments.split_seed)


def as_flags(arguments: argparse.Namespace) -> list[str]:
    """The flags of `add_flags` on another command line, without those that have their defaults."""
    flags = ["--data", str(arguments.data)]
    for name, value in from_flags(arguments)._asdict().items():
        if value != Selection._field_defaults[name]:
            flags += [f"--{name.replace('_', '-')}", str(value)]
    return flags


def _seed(text: str) -> int:
    value = int(text)
    if not 0 <= value < 1 << 64:
        raise argparse.ArgumentTypeError(f"{text} is not from 0 to 2**64 - 1")
    return value


def share(text: str) -> float:
    """The value of a flag from 0 to 1; raises argparse's error for another one."""
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not from 0 to 1")
    return value
