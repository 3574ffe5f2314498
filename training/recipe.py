"""How a network is trained, as data. Every field has its unit and its reason; the flags are made from them."""

import argparse
from dataclasses import dataclass, field, fields, replace
from typing import Any, get_type_hints

from app.errors import SettingsError


def knob(default: Any, group: str, why: str) -> Any:
    return field(default=default, metadata={"group": group, "why": why})


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The default is the bundled network's first part: 95.80 % of held-out images (docs/training.md)."""

    arch: str = knob("convnet", "network", "convnet, or the article's lenet or mlp, each with a recipe of its own")
    widths: tuple[int, ...] = knob(
        (128, 384, 512), "network", "convnet: channels of the groups; more is slower and better"
    )
    depth: int = knob(3, "network", "convnet: convolutions a group; from 3 on with a skip around the last ones")
    initial_weights: str = knob("", "network", "convnet: weights file whose filters it begins with; empty: by chance")
    image_size: int = knob(32, "network", "pixels; pictures of another size are scaled and cut to it")

    epochs: float = knob(
        24.0, "schedule", "passes over the training images; with 0, --initial-weights are calibrated only"
    )
    steps: int = knob(0, "schedule", "updates of the network, in place of epochs; 0: by epochs")
    average: bool = knob(
        False, "schedule", "the mean of this network, of --initial-weights and of what this run ended with before"
    )
    batch_size: int = knob(1000, "schedule", "images a step, over all processes")
    holdout: float = knob(0.05, "schedule", "share of the training images kept aside to choose and to calibrate by")
    seed: int = knob(0, "schedule", "of initialisation, order and augmentation; repeats a run on one machine")

    optimizer: str = knob("muon", "optimizer", "muon for filters with SGD for the rest; adam; sgd at a constant rate")
    lr: float = knob(
        0.01, "optimizer", "sgd: the rate, on the mean loss of a batch; adam: of filters, and of the rest threefold"
    )
    filter_lr: float = knob(0.14, "optimizer", "muon: step for filters of norm sqrt(out); decays linearly to 0")
    filter_momentum: float = knob(0.6, "optimizer", "muon: low, since few steps are made")
    bias_lr: float = knob(0.053, "optimizer", "muon: SGD's for normalisation biases, on losses summed over a batch")
    head_lr: float = knob(0.67, "optimizer", "muon: SGD's for the linear head, on losses summed over a batch")
    momentum: float = knob(0.85, "optimizer", "SGD's; with muon, Nesterov's")
    weight_decay: float = knob(2e-6, "optimizer", "muon: share that biases and head shrink by, a step and image")
    whiten_bias_epochs: float = knob(3.0, "optimizer", "muon: the whitening's bias is trained this long, then fixed")
    label_smoothing: float = knob(0.1, "optimizer", "share of the target spread over all classes")
    freeze_norms: bool = knob(False, "optimizer", "normalisation stays as --initial-weights have it, for small steps")

    teacher: str = knob("", "teacher", "weights file of a network whose answers to six views are learnt; empty: none")
    teacher_anew: bool = knob(
        False, "teacher", "it answers two views of each augmented image at each step, before JPEG; a third slower"
    )
    teacher_share: float = knob(0.9, "teacher", "of the loss that comes from its answers, the rest from the labels")
    teacher_soften: float = knob(2.0, "teacher", "its log-probabilities are divided by this, to tell of lesser classes")

    flip: bool = knob(True, "augmentation", "mirror at random, then the other way in every next epoch")
    translate: int = knob(4, "augmentation", "pixels of random shift, mirrored at the border")
    blend: float = knob(0.0, "augmentation", "share of images mixed with another, for --teacher-anew to answer")
    cutout: int = knob(12, "augmentation", "side in pixels of a covered square; pays from about 15 epochs on")
    jpeg: float = knob(0.0, "augmentation", "share of images sent through JPEG, as uploads are; costs some accuracy")
    jpeg_quality: tuple[int, int] = knob((50, 95), "augmentation", "lowest and highest quality of that")

    @property
    def lasting(self) -> tuple[Any, ...]:
        """What a run cannot change on its way."""
        network = self.arch, self.widths, self.depth, self.image_size
        return *network, self.holdout, self.seed, self.batch_size, self.optimizer

    def network_arguments(self, classes: int) -> dict[str, Any]:
        """What builds the network again, together with its architecture's name."""
        own = {"widths": list(self.widths), "depth": self.depth} if self.arch == "convnet" else {}
        return {"classes": classes, **own}


_PLAIN = Recipe(optimizer="sgd", label_smoothing=0.0, flip=False, translate=0, cutout=0)

RECIPES = {
    "convnet": Recipe(),
    "lenet": replace(_PLAIN, arch="lenet", epochs=2.0, batch_size=4, lr=0.001, momentum=0.9),
    "mlp": replace(_PLAIN, arch="mlp", steps=1000, batch_size=64, lr=0.01, momentum=0.0),
}


CHOICES = {"arch": tuple(RECIPES), "optimizer": ("muon", "adam", "sgd")}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """One flag a field, in groups, with its default and reason. Those not given are left to the arch's recipe."""
    hints = get_type_hints(Recipe)
    groups: dict[str, Any] = {}
    for f in fields(Recipe):
        name = f.metadata["group"]
        group = groups.setdefault(name, parser.add_argument_group(name))
        shown = ",".join(map(str, f.default)) if isinstance(f.default, tuple) else f.default
        options: dict[str, Any] = {"help": f"{f.metadata['why']} [{shown}]", "default": None}
        if isinstance(f.default, bool):
            options["action"] = argparse.BooleanOptionalAction
        else:
            options["type"] = _integers if isinstance(f.default, tuple) else hints[f.name]
            options["metavar"] = "X"
            options["choices"] = CHOICES.get(f.name)
        group.add_argument("--" + f.name.replace("_", "-"), **options)


def from_flags(arguments: argparse.Namespace, begun: Recipe | None = None) -> Recipe:
    """The recipe of a run that was begun, or of the arch, with the flags that were given.

    Raises SettingsError for a value that cannot be, or cannot change any more.
    """
    given = {f.name: value for f in fields(Recipe) if (value := getattr(arguments, f.name)) is not None}
    recipe = replace(begun or RECIPES[given.get("arch", "convnet")], **given)
    if begun and recipe.lasting != begun.lasting:
        raise SettingsError("A resumed run keeps its network, its split, its optimizers and its size of batches.")
    for flag, sound, rule in (
        ("widths", len(recipe.widths) > 0 and min(recipe.widths) > 0, "positive numbers"),
        ("depth", recipe.depth >= 1, "at least 1"),
        ("image-size", recipe.image_size >= 12, "at least 12"),
        ("image-size", recipe.arch != "lenet" or recipe.image_size == 32, "32 for lenet"),
        (
            "epochs",
            recipe.epochs > 0 or (recipe.epochs == 0 and recipe.initial_weights),
            "above 0, or 0 with --initial-weights",
        ),
        ("batch-size", recipe.batch_size >= 1, "at least 1"),
        ("bias-lr", recipe.bias_lr > 0, "above 0"),
        ("head-lr", recipe.head_lr > 0, "above 0"),
        ("holdout", 0 < recipe.holdout < 1, "a share between 0 and 1"),
        ("cutout", 0 <= recipe.cutout <= recipe.image_size, "from 0 to the image size"),
        ("translate", 0 <= recipe.translate < recipe.image_size, "from 0 to below the image size"),
        ("jpeg", 0 <= recipe.jpeg <= 1, "a share from 0 to 1"),
        ("freeze-norms", bool(recipe.initial_weights) or not recipe.freeze_norms, "given with --initial-weights only"),
        ("teacher-anew", bool(recipe.teacher) or not recipe.teacher_anew, "given with --teacher only"),
        ("blend", 0 <= recipe.blend <= 1, "a share from 0 to 1"),
        ("blend", recipe.blend == 0 or recipe.teacher_anew, "given with --teacher-anew only"),
        ("teacher-share", 0 <= recipe.teacher_share <= 1, "a share from 0 to 1"),
    ):
        if not sound:
            raise SettingsError(f"--{flag} must be {rule}.")
    return recipe


def _integers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))
