"""The model card in a weights file: all that serving needs, and documentation for users."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated, Any, Literal, Self

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, model_validator

from app.model import ood
from app.model.baseline import Baseline, Share
from app.model.ood import OodCalibration

Temperature = Annotated[
    float, Field(ge=0.01, lt=100, allow_inf_nan=False, description="divides the logits before softmax")
]
SmoothingCorrection = Annotated[
    float,
    Field(
        ge=0,
        lt=1,
        allow_inf_nan=False,
        description="weight of the uniform distribution that is subtracted after softmax",
    ),
]
ClassName = Annotated[str, Field(min_length=1, max_length=200)]


MAX_INPUT_SIZE = 1024  # pixels
NAME_PATTERN = r"[\w.-]{1,64}"


class Arguments(BaseModel):
    """Constructor arguments of a network, bounded so that no card can allocate without limit."""

    model_config = ConfigDict(strict=True, extra="forbid")

    classes: int = Field(ge=2, le=10_000)

    def input_sizes(self) -> tuple[int, int]:
        """The smallest and the largest width and height of an image, in pixels."""
        return 8, MAX_INPUT_SIZE


class ConvNetArguments(Arguments):
    widths: Annotated[list[Annotated[int, Field(ge=1, le=4096)]], Field(min_length=1, max_length=8)]
    depth: int = Field(ge=1, le=16)

    def input_sizes(self) -> tuple[int, int]:
        return max(8, 2 ** len(self.widths) + 1), MAX_INPUT_SIZE  # each group halves what the whitening leaves

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The state of `networks.ConvNet` after batch-norm folding: name to shape."""
        whitened = 24  # both signs of 12 principal directions of 2 x 2 x 3 patches
        shapes: dict[str, tuple[int, ...]] = {"whiten.weight": (whitened, 3, 2, 2), "whiten.bias": (whitened,)}
        channels = whitened
        for group, width in enumerate(self.widths):
            for i in range(self.depth):
                name = f"groups.{group}.convs.{i}"
                shapes |= {f"{name}.weight": (width, channels, 3, 3), f"{name}.bias": (width,)}
                channels = width
        return shapes | {"head.weight": (self.classes, channels)}

    def ood_shapes(self) -> dict[str, tuple[int, ...]]:
        """The tensors of the out-of-distribution score: name to shape."""
        features = sum(self.widths[:-1])
        return {ood.WHITENING: (features, features), ood.MEANS: (self.classes, features)}


class LeNetArguments(Arguments):
    def input_sizes(self) -> tuple[int, int]:
        return 32, 32


class MLPArguments(Arguments):
    hidden: int = Field(14, ge=1, le=65_536)


ARGUMENTS: dict[str, type[Arguments]] = {"convnet": ConvNetArguments, "lenet": LeNetArguments, "mlp": MLPArguments}


class Stage(BaseModel):
    """One forward pass of a cascade. An image leaves after the stage whose top probability reaches `threshold`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    network: int = Field(ge=0, description="index in `networks`")
    hflip: bool = Field(False, description="the network gets the horizontal flip of the image")
    average_last: int = Field(1, ge=1, description="stages, this one included, whose log-probabilities are averaged")
    temperature: Temperature = 1.0
    label_smoothing_correction: SmoothingCorrection = 0.0
    threshold: Share | None = Field(None, description="top probability from which an image leaves; null in the last")
    share: Share | None = Field(None, description="share of held-out images that reach the stage")


def check_references(stages: Sequence[Stage], networks: int) -> None:
    """Raises ValueError for a stage of a cascade of so many networks that refers to another, or to no earlier stage."""
    for index, stage in enumerate(stages):
        if stage.network >= networks or stage.average_last > index + 1:
            raise ValueError(f"stage {index} refers to a network or a stage that does not exist")


class ModelCard(BaseModel):
    """One network, or a cascade of `stages` over `networks`.

    Fields that were renamed are read from older files by their former names.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    name: Annotated[str, Field(pattern=f"^{NAME_PATTERN}$")]
    classes: Annotated[list[ClassName], Field(min_length=2, max_length=10_000)]
    input_size: Annotated[int, Field(ge=8, le=MAX_INPUT_SIZE, description="width and height in pixels")]
    architecture: Literal["convnet", "lenet", "mlp", "cascade"]
    arguments: dict[str, Any]
    parameters: Annotated[int, Field(gt=0)]
    forward_gflops: Annotated[
        float | None,
        Field(
            gt=0,
            allow_inf_nan=False,
            description="per image, a multiply-add counts as two; of a cascade the mean over test images",
        ),
    ] = None
    temperature: Temperature
    label_smoothing_correction: SmoothingCorrection = Field(
        0.0, validation_alias=AliasChoices("label_smoothing_correction", "smoothing")
    )
    activation_ranges: dict[str, Annotated[float, Field(gt=0, allow_inf_nan=False)]] = Field(
        default_factory=dict, description="largest int8 input of each quantised convolution"
    )
    ood: Annotated[
        OodCalibration | None, Field(description="of the network's out-of-distribution score; of a cascade its first's")
    ] = None
    baseline: Annotated[Baseline | None, Field(description="histograms of held-out images")] = None
    networks: Annotated[list["ModelCard"], Field(max_length=8, description="of a cascade")] = []
    stages: Annotated[list[Stage], Field(max_length=16, description="of a cascade, in order")] = []
    test_accuracy: Annotated[Share | None, Field(description="null if the test images were not read")]
    dataset: str = Field(validation_alias=AliasChoices("dataset", "data_set"))
    recipe: dict[str, Any]
    results: dict[str, Any] = Field(default_factory=dict, description="further metrics from training")

    def exit_shares(self) -> list[float]:
        """Share of held-out images that leave after each stage; empty for one network, or where it is not known."""
        reaching = [stage.share for stage in self.stages if stage.share is not None]
        if len(reaching) < len(self.stages):
            return []
        return [share - after for share, after in pairwise([*reaching, 0.0])]

    @property
    def has_ood_score(self) -> bool:
        """Of a cascade: whether the network of its first stage has one."""
        first = self.networks[self.stages[0].network] if self.stages else self
        return first.ood is not None

    @model_validator(mode="after")
    def _check_arguments(self) -> Self:
        if self.architecture == "cascade":
            return self
        arguments = ARGUMENTS[self.architecture].model_validate(self.arguments)
        if arguments.classes != len(self.classes):
            raise ValueError(f"arguments have {arguments.classes} classes, the card has {len(self.classes)}")
        if self.ood and len(self.arguments.get("widths", [])) < 2:
            raise ValueError("an out-of-distribution score needs a convnet with two groups or more")
        if len(set(self.classes)) < len(self.classes):
            raise ValueError("two classes have the same name")
        smallest, largest = arguments.input_sizes()
        if not smallest <= self.input_size <= largest:
            raise ValueError(f"input_size is {self.input_size}, the network's is {smallest} to {largest}")
        return self

    @model_validator(mode="after")
    def _check_baseline(self) -> Self:
        if self.baseline and len(self.baseline.classes) != len(self.classes):
            raise ValueError(f"the baseline has {len(self.baseline.classes)} classes, the card has {len(self.classes)}")
        return self

    @model_validator(mode="after")
    def _check_cascade(self) -> Self:
        if (self.architecture == "cascade") != bool(self.networks and self.stages):
            raise ValueError("a cascade, and no other model, has networks and stages")
        for network in self.networks:
            if network.networks or network.classes != self.classes or network.input_size != self.input_size:
                raise ValueError("a network of the cascade differs in classes or input size, or is a cascade")
        check_references(self.stages, len(self.networks))
        for index, stage in enumerate(self.stages):
            if (stage.threshold is None) != (index == len(self.stages) - 1):
                raise ValueError("every stage but the last has a threshold")
        return self
