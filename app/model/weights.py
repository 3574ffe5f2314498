"""The weights file: safetensors with a model card in its metadata. No pickle.

Tensors: the network's state, `reference.images` (uint8 [R, S, S, 3]) and `reference.probabilities` (float32
[R, classes]), which the service must reproduce before it is ready. The state is in half precision; an int8 tensor is
multiplied by `<name>.scale`, which has one number per output channel.
Metadata: one entry, `thirtytwo`, a JSON object with the `card` (see ModelCard) and the `digest`, a SHA-256 over
the card and every tensor.
"""

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from app.errors import WeightsError

Tensors = dict[str, NDArray[Any]]

BUNDLED = Path(__file__).parents[1] / "assets" / "cifar10.safetensors"

LEAST = 0.01  # what is left of a probability below the share of smoothing, so that the order stays
METADATA = "thirtytwo"
SCALE = ".scale"
REFERENCE_IMAGES, REFERENCE_PROBABILITIES = "reference.images", "reference.probabilities"


class ModelCard(BaseModel):
    """What the file records about its model: all that serving needs, and what a user wants to know.

    Fields that were renamed are read from older files by their former names.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    name: Annotated[str, Field(pattern=r"^[\w.-]{1,64}$")]
    classes: Annotated[
        list[Annotated[str, Field(min_length=1, max_length=200)]], Field(min_length=2, max_length=10_000)
    ]
    input_size: Annotated[int, Field(ge=8, le=1024, description="width and height in pixels")]
    architecture: str
    arguments: dict[str, Any]
    parameters: Annotated[int, Field(gt=0)]
    forward_gflops: Annotated[
        float | None, Field(gt=0, description="per image, a multiply-add counts as two; null in early files")
    ] = None
    temperature: Annotated[float, Field(gt=0, lt=100, description="divides the logits before softmax")]
    label_smoothing_correction: float = Field(
        0.0,
        ge=0,
        lt=1,
        validation_alias=AliasChoices("label_smoothing_correction", "smoothing"),
        description="weight of the uniform distribution that is subtracted after softmax",
    )
    activation_ranges: dict[str, Annotated[float, Field(gt=0)]] = Field(
        default_factory=dict, description="largest int8 input of each quantised convolution"
    )
    test_accuracy: Annotated[float | None, Field(ge=0, le=1, description="null if the test images were not read")]
    dataset: str = Field(validation_alias=AliasChoices("dataset", "data_set"))
    recipe: dict[str, Any]
    results: dict[str, Any] = Field(default_factory=dict, description="further metrics from training")


class Weights(NamedTuple):
    """Contents of a weights file; `state` as stored: half precision, or int8 with a scale."""

    card: ModelCard
    state: Tensors
    reference_images: NDArray[np.uint8]
    reference_probabilities: NDArray[np.float32]
    sha256: str

    @property
    def version(self) -> str:
        return self.sha256[:8]

    def dequantized(self) -> dict[str, NDArray[np.float32]]:
        """The network's state dict in float32; raises WeightsError for a scale of the wrong shape."""
        state = {name: value.astype(np.float32) for name, value in self.state.items() if not name.endswith(SCALE)}
        for name, scale in self.state.items():
            if name.endswith(SCALE):
                filters = state.get(name.removesuffix(SCALE), np.empty(0))
                if scale.shape != (*filters.shape[:1], *[1] * (filters.ndim - 1)):
                    raise WeightsError(f"The tensor {name} does not fit the tensor that it scales.")
                filters *= scale
        return state


def save(
    path: Path, card: ModelCard, state: Tensors, images: NDArray[np.uint8], probabilities: NDArray[np.float32]
) -> None:
    """Writes the file atomically; raises OSError."""
    tensors = {name: np.ascontiguousarray(value) for name, value in state.items()}
    tensors[REFERENCE_IMAGES] = np.ascontiguousarray(images)
    tensors[REFERENCE_PROBABILITIES] = np.ascontiguousarray(probabilities.astype(np.float32))
    card_json = card.model_dump(mode="json")
    metadata = {METADATA: json.dumps({"card": card_json, "digest": _digest(card_json, tensors)})}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    try:
        save_file(tensors, partial, metadata)
        partial.chmod(0o644)  # save_file makes it private; the service may run as another user
        partial.replace(path)
    except SafetensorError as error:  # safetensors reports a full disk this way
        raise OSError(f"{path} cannot be written: {error}.") from error
    finally:
        partial.unlink(missing_ok=True)


def load(path: Path) -> Weights:
    """Reads and verifies the file; raises WeightsError that names it."""
    try:
        with path.open("rb") as stream:
            sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {error.strerror or error}.") from error
    except (SafetensorError, TypeError, ValueError) as error:
        raise WeightsError(f"{path} is not a safetensors file, or is cut off: {error}.") from error
    return _check(path, metadata, tensors, sha256)


def _check(path: Path, metadata: dict[str, str], tensors: Tensors, sha256: str) -> Weights:
    try:
        content = json.loads(metadata[METADATA])
        card_json, digest = content["card"], content["digest"]
    except (KeyError, TypeError, ValueError) as error:
        raise WeightsError(f"{path} was not written by this project's training: it has no card.") from error
    if digest != _digest(card_json, tensors):  # over the JSON as stored: field names change, files do not
        raise WeightsError(f"{path} was altered after training: its digest does not match its content.")
    try:
        card = ModelCard.model_validate(card_json)
        images, probabilities = tensors.pop(REFERENCE_IMAGES), tensors.pop(REFERENCE_PROBABILITIES)
    except (ValidationError, KeyError) as error:
        reason = error.errors()[0]["loc"] if isinstance(error, ValidationError) else error
        raise WeightsError(f"{path} has an invalid card: {reason}.") from error
    shape = (len(images), card.input_size, card.input_size, 3)
    if not len(images) or images.shape != shape or probabilities.shape != (len(images), len(card.classes)):
        raise WeightsError(f"{path} has reference images that do not match its card.")
    return Weights(card, tensors, images, probabilities, sha256)


def _digest(card: dict[str, Any], tensors: Tensors) -> str:
    digest = hashlib.sha256(json.dumps(card, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tensor.shape}\n".encode())
        digest.update(np.ascontiguousarray(tensor).tobytes())
    return digest.hexdigest()
