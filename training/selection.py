"""Chooses what of a recipe is not given, from the number of images, the classes and cross-validation.

A linear head on frozen features needs seconds and few images. Fine-tuning of all layers wins with thousands of images,
or where the features do not separate the classes (Kumar et al. 2022, arXiv 2202.10054).
"""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from app.engines.pytorch import load_network
from app.errors import DataError, SettingsError
from app.model.networks import ConvNet
from app.model.weights import BUNDLED, Weights
from training import cli, data, features, linear_head, plan
from training.data import Split
from training.linear_head import LinearHead
from training.plan import Choice, Plan
from training.recipe import DistillationFields, OptimizerFields, Recipe, ScheduleFields

IMBALANCE = 5  # largest class to smallest, above which classes are weighted
PLENTY = 3000  # images; with more, all layers are trained
SAMPLE = 2000  # images for the cross-validation of more than PLENTY
GOOD = 0.9  # balanced accuracy of a head, with which other ways are not tried
LARGE = 20_000  # images for which the default schedule is made

# Flags that a head has no use for, and that therefore exclude it.
SCHEDULE_FLAGS = frozenset(
    name
    for section in (ScheduleFields, OptimizerFields, DistillationFields)
    for name in section.model_fields
    if name not in ("val_fraction", "seed", "class_balance")
)


def prepared(recipe: Recipe, given: Collection[str], world_size: int = 1) -> Recipe:
    """The recipe with the image size of --initial-weights where --image-size is not given; before the data are read.

    Raises SettingsError for a head and several processes or another size, or WeightsError.
    """
    if recipe.finetune == "head" and world_size > 1:
        raise SettingsError("--finetune head needs one process; torchrun is for --finetune all and none.")
    if recipe.arch != "convnet" or not (recipe.initial_weights or recipe.finetune == "head"):
        return recipe
    file = _initial_file(recipe)
    size = features.load_backbone(file).card.input_size
    if "image_size" not in given:
        recipe = cli.validated(recipe.model_dump() | {"image_size": size})
    if recipe.finetune == "head" and recipe.image_size != size:
        raise SettingsError(f"--finetune head needs --image-size {size}, the size of {file}.")
    return recipe


class Validation(NamedTuple):
    """`mask` bool [N] selects the validation images among all images; `own`: they are the data's own part."""

    mask: Tensor
    own: bool = False

    def head_images(self) -> Tensor:
        """Mask bool [N] of the images of a head: a random share is not needed, since cross-validation holds out all."""
        return ~self.mask if self.own else torch.ones_like(self.mask)


def validation(recipe: Recipe, given: Collection[str], images: Split, own: Tensor | None = None) -> Validation:
    """The data's `own` mask, or a random one with the share that `choose` gives the recipe.

    It comes before every choice: a network must not start from what validates it. Raises DataError for a class of one
    image.
    """
    if own is not None:
        return Validation(own, own=True)
    is_chosen = recipe.arch == "convnet" and recipe.finetune != "none" and "val_fraction" not in given
    fraction = _val_fraction(len(images)) if is_chosen and len(images) < LARGE else recipe.val_fraction
    return Validation(data.val_mask(images, fraction, recipe.seed))


def choose(
    recipe: Recipe, given: Collection[str], train: Split, classes: int, held_out: Validation, world_size: int = 1
) -> Plan:
    """Completes the recipe; the fields in `given` stay. `train` has the validation images, too.

    Raises DataError for a class of one image, or WeightsError for --initial-weights of another kind.
    """
    balance = _class_balance(recipe, train)
    recipe = recipe.model_copy(update={"class_balance": balance.value})
    choices = [balance] if "class_balance" not in given else []
    if recipe.arch != "convnet":
        return Plan(recipe.model_copy(update={"finetune": "none"}), choices)
    backbone = None if recipe.finetune == "none" else features.load_backbone(_initial_file(recipe))
    head = None
    if backbone is None or (reason := _reason_for_none(recipe, given, backbone, world_size)):
        finetune = Choice("finetune", "none", "" if backbone is None else reason)
    else:
        if _has_head(recipe, backbone, classes, world_size):
            head = fit_head(recipe, given, train, classes, held_out, backbone)
        finetune = _finetune(recipe, given, len(train), head, backbone)
    choices += [finetune] if recipe.finetune == "auto" else []
    chosen: dict[str, Any] = {"finetune": finetune.value}
    if finetune.value != "none" and backbone is not None:
        chosen |= {name: backbone.card.arguments[name] for name in ("widths", "depth") if name not in given}
        chosen["initial_weights"] = recipe.initial_weights or str(BUNDLED)
    choices += [each for each in _from_head(head, finetune.value) if each.field not in given]
    # An explicit none is the recipe of the flags and their defaults, as documented.
    if finetune.value != "head" and recipe.finetune != "none":
        choices += [each for each in _schedule(finetune.value, len(train)) if each.field not in given]
    chosen |= {each.field: each.value for each in choices}
    trial = (recipe.finetune, finetune.value) == ("auto", "all") and not SCHEDULE_FLAGS & set(given)
    trial = trial and head is not None and len(train) <= PLENTY
    return Plan(cli.validated(recipe.model_dump() | chosen), choices, backbone, head, trial)


def _has_head(recipe: Recipe, backbone: Weights, classes: int, world_size: int) -> bool:
    """Whether a head is fitted; raises DataError where nothing is trained and the head of the start does not fit."""
    if recipe.epochs == recipe.max_steps == 0 and classes != (old := len(backbone.card.classes)):
        raise DataError(f"--epochs 0 keeps the head of {old} classes; the data have {classes}.")
    # A head is for the size of the network that has its features; all layers learn another size.
    is_other_size = recipe.finetune == "auto" and recipe.image_size != backbone.card.input_size
    return world_size == 1 and recipe.epochs > 0 and not is_other_size


def resumed(recipe: Recipe, given: Collection[str], state: Mapping[str, Any]) -> Plan:
    """The plan of a checkpoint, whose trial a schedule flag ends as it does in a new run. Raises DataError."""
    is_trial = "head" in state and not SCHEDULE_FLAGS & set(given)
    return plan.from_state(recipe, state, features.load_backbone(_initial_file(recipe)) if is_trial else None)


def fit_head(
    recipe: Recipe, given: Collection[str], train: Split, classes: int, held_out: Validation, backbone: Weights
) -> LinearHead:
    """A head on the backbone's features, of a sample of the images where a head is not a candidate."""
    is_sampled = recipe.finetune != "head" and len(train) > PLENTY
    selected = held_out.head_images()
    train, mask = train.select(selected), held_out.mask[selected]
    _check_counts(train.labels)
    if is_sampled:
        positions = sample(train.labels, mask, SAMPLE, recipe.seed)
        train, mask = train.select(positions), mask[positions]
    network = load_network(backbone)
    assert isinstance(network, ConvNet)
    return linear_head.fit(
        features.extract_views(network, train.images),
        train.labels.numpy(),
        classes=classes,
        balanced=recipe.class_balance == "weights",
        hflip=recipe.hflip if "hflip" in given else None,
        inverse_penalty=recipe.head_c,
        seed=recipe.seed,
        held_out=mask.numpy(),
    )


def sample(labels: Tensor, mask: Tensor, count: int, seed: int) -> Tensor:
    """Random positions int64 [count], or more where two images of every class need more; those of `mask` come last."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    order = torch.cat([order[~mask[order]], order[mask[order]]])
    is_first = torch.zeros(len(labels), dtype=torch.bool)  # cross-validation needs two images of every class
    for label in labels.unique():
        is_first[order[labels[order] == label][:2]] = True
    firsts, others = order[is_first[order]], order[~is_first[order]]
    return torch.cat([firsts, others[: max(0, count - len(firsts))]])


def _check_counts(labels: Tensor) -> None:
    """Raises DataError for labels that no cross-validation can divide."""
    counts = torch.bincount(labels)
    if (counts == 1).any():
        raise DataError("Every class needs two training images: a head is cross-validated.")
    if (counts > 0).sum() < 2:
        raise DataError("The training images are of one class; a head needs two.")


def _initial_file(recipe: Recipe) -> Path:
    return Path(recipe.initial_weights) if recipe.initial_weights else BUNDLED


def _class_balance(recipe: Recipe, train: Split) -> Choice:
    counts = torch.bincount(train.labels)
    largest, smallest = int(counts.max()), int(counts[counts > 0].min())
    reason = f"the largest class has {largest} images, the smallest {smallest}"
    if recipe.class_balance != "auto":
        return Choice("class_balance", recipe.class_balance, reason)
    return Choice("class_balance", "weights" if largest > IMBALANCE * smallest else "none", reason)


def _reason_for_none(recipe: Recipe, given: Collection[str], backbone: Weights, world_size: int) -> str:
    """Why `auto` does not start from the bundled network; empty where it can."""
    if recipe.finetune != "auto" or recipe.initial_weights:
        return ""
    if named := [name for name in ("widths", "depth", "teacher") if name in given]:
        return f"--{named[0]} is given"
    if recipe.image_size != backbone.card.input_size:
        return f"the bundled network is for {backbone.card.input_size} pixels"
    return "several processes" if world_size > 1 else ""


def _finetune(
    recipe: Recipe, given: Collection[str], images: int, head: LinearHead | None, backbone: Weights
) -> Choice:
    start = f"{backbone.card.name} {backbone.version}"
    if head is None or recipe.finetune != "auto":
        return Choice("finetune", "all" if recipe.finetune == "auto" else recipe.finetune, f"from {start}")
    score = linear_head.balanced_accuracy(head.log_probabilities(), head.labels)
    fact = f"a head on features of {start} has a cross-validated balanced accuracy of {score:.1%}"
    if named := sorted(SCHEDULE_FLAGS & set(given)):
        return Choice("finetune", "all", f"--{named[0].replace('_', '-')} is given")
    if images <= PLENTY:
        return Choice("finetune", "head" if score >= GOOD else "all", fact)
    classes = head.weight.shape[0]
    similar = score >= (1 + 1 / classes) / 2
    start_is_given = bool(recipe.initial_weights)  # which training from nothing would not use
    return Choice("finetune", "all" if similar or start_is_given else "none", f"{images} images; {fact}")


def _from_head(head: LinearHead | None, finetune: str) -> list[Choice]:
    if head is None:
        return []
    loss = f"cross-validated accuracy on flips is {head.flip_loss * 100:.1f} points below that on images"
    choices = [Choice("hflip", head.hflip, loss)]
    if finetune == "head":
        choices.append(Choice("head_c", head.inverse_penalty, "least cross-validated loss"))
    return choices


def _schedule(finetune: str, images: int) -> list[Choice]:
    """Batch size, epochs and rates; none for which the defaults are made."""
    choices = []
    if images < LARGE:
        batch_size = 2 ** int(np.clip(round(np.log2(images / 8)), 5, 9))
        total, least, most = (6_000, 8, 30) if finetune == "all" else (24_000, 24, 100)
        epochs = float(np.clip(round(total / images), least, most))
        choices += [
            Choice("batch_size", batch_size, f"{images} images"),
            Choice("epochs", epochs, f"{images} images"),
            Choice("val_fraction", _val_fraction(images), f"{images} images"),
        ]
    if finetune == "all":
        choices += [
            Choice("muon_lr", 0.02, "fine-tuning: a seventh of the default"),
            Choice("norm_bias_lr", 0.0078, "fine-tuning: a seventh of the default"),
            Choice("head_lr", 0.098, "fine-tuning: a seventh of the default"),
            Choice("cutout", 0, "fine-tuning is short"),
        ]
    return choices


def _val_fraction(images: int) -> float:
    return 0.2 if images < 2000 else 0.1
