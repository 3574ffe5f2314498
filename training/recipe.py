"""How a network is trained, as data: each field has its unit, bounds and reason. `training.cli` makes flags of them."""

from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, field_validator, model_validator

from app.model.card import ConvNetArguments


class Section(BaseModel):
    """The docstring of a section is the title of its flags in `training.train --help`."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class NetworkFields(Section):
    """network"""

    arch: Literal["convnet", "lenet", "mlp"] = Field(
        "convnet", description="architecture; the article's lenet and mlp have default recipes of their own"
    )
    widths: tuple[PositiveInt, ...] = Field(
        (128, 384, 512), min_length=1, description="convnet: channels of each group; more is slower and more accurate"
    )
    depth: int = Field(3, ge=1, description="convnet: convolutions per group; 3 and more get a skip connection")
    finetune: Literal["auto", "head", "all", "none"] = Field(
        "auto",
        description="head: a linear head on frozen features; all: every layer of --initial-weights; none: random init; "
        "auto: by the number of images and cross-validation",
    )
    head_c: float = Field(
        0.0, ge=0, description="head: inverse L2 penalty, C of scikit-learn; 0: chosen by cross-validation"
    )
    initial_weights: str = Field("", description="convnet: weights file to fine-tune from; empty: the bundled one")
    image_size: int = Field(32, ge=12, description="pixels; images of another size are resized and centre-cropped")


class ScheduleFields(Section):
    """schedule"""

    epochs: float = Field(
        24.0, ge=0, description="passes over the training images; 0 only recalibrates --initial-weights"
    )
    max_steps: int = Field(0, ge=0, description="optimizer steps, instead of --epochs; 0: use --epochs")
    average_checkpoints: bool = Field(
        False,
        description="average the final weights with --initial-weights and with the final checkpoints before --resume",
    )
    batch_size: int = Field(1000, ge=1, description="images per step, over all processes")
    val_fraction: float = Field(
        0.05, gt=0, lt=1, description="share of the training images held out for validation and calibration"
    )
    seed: int = Field(
        0,
        description="seed of initialisation, order and augmentation; a CPU repeats a run bit for bit with as many "
        "threads, a GPU only up to rounding",
    )


class OptimizerFields(Section):
    """optimizer"""

    optimizer: Literal["muon", "adam", "sgd"] = Field(
        "muon", description="muon: Muon for filters, SGD for the rest; adam; sgd: constant rate"
    )
    lr: float = Field(
        0.01, ge=0, description="sgd, adam: learning rate for the mean loss of a batch; adam: times 3 for non-filters"
    )
    muon_lr: float = Field(0.14, ge=0, description="muon: step for filters of norm sqrt(out); decays linearly to 0")
    muon_momentum: float = Field(0.6, ge=0, lt=1, description="muon: low, because runs have few steps")
    norm_bias_lr: float = Field(
        0.053, gt=0, description="muon: SGD rate of batch-norm biases, for losses summed over a batch"
    )
    head_lr: float = Field(0.67, gt=0, description="muon: SGD rate of the linear head, for losses summed over a batch")
    sgd_momentum: float = Field(0.85, ge=0, lt=1, description="SGD momentum; Nesterov's with muon")
    weight_decay: float = Field(2e-6, ge=0, description="muon: relative decay of biases and head, per step and image")
    whiten_bias_epochs: float = Field(3.0, ge=0, description="muon: epochs after which the whitening bias is frozen")
    label_smoothing: float = Field(0.1, ge=0, lt=1, description="share of the target spread over all classes")
    class_balance: Literal["auto", "weights", "none"] = Field(
        "auto", description="weights: classes have equal shares in the loss; auto: where counts differ above 5 to 1"
    )
    freeze_bn: bool = Field(False, description="keep the batch-norm statistics of --initial-weights")


class DistillationFields(Section):
    """distillation"""

    teacher: str = Field("", description="weights file of the teacher; empty: none. Its targets average six views")
    online_teacher: bool = Field(
        False, description="compute targets on each augmented image (two views, before JPEG); a third slower"
    )
    distill_weight: float = Field(0.9, ge=0, le=1, description="share of the loss from the teacher's targets")
    distill_temperature: float = Field(
        2.0, gt=0, description="divides the teacher's log-probabilities; softens targets"
    )


class AugmentationFields(Section):
    """augmentation"""

    hflip: bool = Field(True, description="random horizontal flip, alternating each epoch (airbench)")
    random_crop_padding: int = Field(4, ge=0, description="pixels of reflection padding before a random crop")
    mixup: float = Field(0.0, ge=0, le=1, description="share of images mixed with another; needs --online-teacher")
    cutout: int = Field(12, ge=0, description="side of the erased square in pixels; helps beyond about 15 epochs")
    jpeg_prob: float = Field(
        0.0, ge=0, le=1, description="share of images compressed as JPEG, as uploads are; costs some clean accuracy"
    )
    jpeg_quality: tuple[int, int] = Field((50, 95), description="lowest and highest JPEG quality")


SECTIONS: tuple[type[Section], ...] = (
    NetworkFields,
    ScheduleFields,
    OptimizerFields,
    DistillationFields,
    AugmentationFields,
)

# Fields that a resumed run cannot change: the checkpoint's tensors and the order of its data follow from them.
IMMUTABLE_FIELDS = ("arch", "widths", "depth", "image_size", "val_fraction", "seed", "batch_size", "optimizer")

# Former names, accepted as flags and in checkpoints for one release.
DEPRECATED_NAMES = {
    "average": "average_checkpoints",
    "holdout": "val_fraction",
    "steps": "max_steps",
    "filter_lr": "muon_lr",
    "filter_momentum": "muon_momentum",
    "bias_lr": "norm_bias_lr",
    "momentum": "sgd_momentum",
    "freeze_norms": "freeze_bn",
    "teacher_anew": "online_teacher",
    "teacher_share": "distill_weight",
    "teacher_soften": "distill_temperature",
    "flip": "hflip",
    "translate": "random_crop_padding",
    "blend": "mixup",
    "jpeg": "jpeg_prob",
}


class Recipe(NetworkFields, ScheduleFields, OptimizerFields, DistillationFields, AugmentationFields):
    """With `finetune` none, the defaults are part 1 of the bundled large network (docs/model-card.md)."""

    def network_arguments(self, classes: int) -> dict[str, Any]:
        """Keyword arguments that rebuild the network, together with `arch`."""
        own = {"widths": list(self.widths), "depth": self.depth} if self.arch == "convnet" else {}
        return {"classes": classes, **own}

    @model_validator(mode="before")
    @classmethod
    def _rename(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        return {DEPRECATED_NAMES.get(name, name): value for name, value in values.items()}

    @field_validator("widths", "jpeg_quality", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        return tuple(value.split(",")) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _check_combinations(self) -> Self:
        groups = ConvNetArguments.model_construct(classes=2, widths=list(self.widths), depth=self.depth)
        smallest = groups.input_sizes()[0] if self.arch == "convnet" else 0
        for valid, rule in (
            (-(1 << 63) <= self.seed < 1 << 64, "--seed has at most 64 bits"),
            (self.arch != "lenet" or self.image_size == 32, "--arch lenet needs --image-size 32"),
            (self.epochs > 0 or bool(self.initial_weights), "--epochs 0 needs --initial-weights"),
            (self.epochs > 0 or self.finetune != "head", "--finetune head excludes --epochs 0"),
            (self.arch == "convnet" or self.finetune in ("auto", "none"), "--finetune needs --arch convnet"),
            (self.finetune != "none" or not self.initial_weights, "--finetune none excludes --initial-weights"),
            (self.image_size >= smallest, f"--widths of {len(self.widths)} groups needs --image-size {smallest}"),
            (self.cutout <= self.image_size, "--cutout is at most --image-size"),
            (self.random_crop_padding < self.image_size, "--random-crop-padding is below --image-size"),
            (not self.freeze_bn or bool(self.initial_weights), "--freeze-bn needs --initial-weights"),
            (not self.online_teacher or bool(self.teacher), "--online-teacher needs --teacher"),
            (not self.mixup or self.online_teacher, "--mixup needs --online-teacher"),
            (1 <= self.jpeg_quality[0] <= self.jpeg_quality[1] <= 100, "--jpeg-quality is LOW,HIGH from 1 to 100"),
        ):
            if not valid:
                raise ValueError(rule)
        return self


_PLAIN = {"optimizer": "sgd", "label_smoothing": 0.0, "hflip": False, "random_crop_padding": 0, "cutout": 0}

DEFAULT_RECIPES = {
    "convnet": Recipe(),
    # The article's two networks, trained as the article does.
    "lenet": Recipe.model_validate(
        {**_PLAIN, "arch": "lenet", "epochs": 2.0, "batch_size": 4, "lr": 0.001, "sgd_momentum": 0.9}
    ),
    "mlp": Recipe.model_validate(
        {**_PLAIN, "arch": "mlp", "max_steps": 1000, "batch_size": 64, "lr": 0.01, "sgd_momentum": 0.0}
    ),
}
