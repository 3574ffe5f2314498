"""How a network is trained, as data. Every field has its unit and its reason; the flags are made from them."""

import argparse
from dataclasses import dataclass, field, fields
from typing import Any, get_type_hints


def knob(default: Any, group: str, why: str) -> Any:
    return field(default=default, metadata={"group": group, "why": why})


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The default is the recipe of the bundled weights, chosen on images held out from the training set."""

    arch: str = knob("convnet", "network", "a name from app.model.networks.ARCHITECTURES")
    widths: tuple[int, ...] = knob((64, 256, 256), "network", "channels of the groups; more are slower and better")
    depth: int = knob(2, "network", "convolutions a group; from 3 on with a skip around the last ones")
    image_size: int = knob(32, "network", "pixels; pictures of another size are scaled and cut to it")

    epochs: float = knob(12.0, "schedule", "passes over the training images")
    batch_size: int = knob(1000, "schedule", "images a step, over all processes")
    holdout: float = knob(0.05, "schedule", "share of the training images kept aside to choose and to calibrate by")
    seed: int = knob(0, "schedule", "of initialisation, order and augmentation; repeats a run on one machine")

    filter_lr: float = knob(0.17, "optimizer", "Muon's step for filters of norm sqrt(out); decays linearly to 0")
    filter_momentum: float = knob(0.6, "optimizer", "Muon's; low, since few steps are made")
    bias_lr: float = knob(0.053, "optimizer", "SGD's for normalisation biases, on losses summed over a batch")
    head_lr: float = knob(0.67, "optimizer", "SGD's for the linear head, on losses summed over a batch")
    momentum: float = knob(0.85, "optimizer", "SGD's, with Nesterov's look ahead")
    weight_decay: float = knob(2e-6, "optimizer", "share that biases and head shrink by, a step and image of the batch")
    whiten_bias_epochs: float = knob(3.0, "optimizer", "the whitening's bias is trained this long, then fixed")
    label_smoothing: float = knob(0.2, "optimizer", "share of the target spread over all classes")

    translate: int = knob(2, "augmentation", "pixels of random shift, mirrored at the border")
    cutout: int = knob(0, "augmentation", "side in pixels of a covered square; pays from about 15 epochs on")
    jpeg: float = knob(0.25, "augmentation", "share of images sent through JPEG, since uploads are often JPEG")
    jpeg_quality: tuple[int, int] = knob((50, 95), "augmentation", "lowest and highest quality of that")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """One flag a field, in groups, with its default and reason."""
    hints = get_type_hints(Recipe)
    groups: dict[str, Any] = {}
    for f in fields(Recipe):
        name = f.metadata["group"]
        group = groups.setdefault(name, parser.add_argument_group(name))
        convert = _integers if isinstance(f.default, tuple) else hints[f.name]
        shown = ",".join(map(str, f.default)) if isinstance(f.default, tuple) else f.default
        flag = "--" + f.name.replace("_", "-")
        group.add_argument(flag, type=convert, default=f.default, metavar="X", help=f"{f.metadata['why']} [{shown}]")


def from_flags(arguments: argparse.Namespace) -> Recipe:
    return Recipe(**{f.name: getattr(arguments, f.name) for f in fields(Recipe)})


def _integers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))
