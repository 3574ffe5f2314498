"""The weights file: safetensors with a card in its metadata. Reader and writer side by side; nothing is unpickled.

Tensors: the network's state, `reference.images` (uint8 [R, S, S, 3]) and `reference.probabilities` (float32
[R, classes]), which the service must reproduce before it is ready. The state is in half precision; a tensor in int8
stands for its product with `<name>.scale`, which has one number for each output channel.
Metadata: one entry, `thirtytwo`, a JSON object with the `card` (see ModelCard) and the `digest`, a SHA-256 over
the card and every tensor.
"""

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError
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
    """What the file says of itself. Everything serving needs, and what a reader wants to know."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Annotated[str, Field(pattern=r"^[\w.-]{1,64}$")]
    classes: Annotated[
        list[Annotated[str, Field(min_length=1, max_length=200)]], Field(min_length=2, max_length=10_000)
    ]
    input_size: Annotated[int, Field(ge=8, le=1024, description="width and height in pixels")]
    architecture: str
    arguments: dict[str, Any]
    parameters: Annotated[int, Field(gt=0)]
    forward_gflops: Annotated[
        float | None, Field(gt=0, description="for one image, a multiply-add counted as two; null in early files")
    ] = None
    temperature: Annotated[float, Field(gt=0, lt=100, description="logits are divided by it before softmax")]
    smoothing: Annotated[
        float, Field(ge=0, lt=1, description="share of an even answer that is taken out of softmax's")
    ] = 0.0
    activation_ranges: dict[str, Annotated[float, Field(gt=0)]] = Field(
        default_factory=dict, description="largest input that each convolution tells apart in int8"
    )
    test_accuracy: Annotated[float | None, Field(ge=0, le=1, description="null where the test images were left unread")]
    data_set: str
    recipe: dict[str, Any]
    results: dict[str, Any] = Field(default_factory=dict, description="further figures from training")


class Weights(NamedTuple):
    """A file's content; `state` as it is stored."""

    card: ModelCard
    state: Tensors
    reference_images: NDArray[np.uint8]
    reference_probabilities: NDArray[np.float32]
    sha256: str

    @property
    def version(self) -> str:
        return self.sha256[:8]

    def dequantized(self) -> dict[str, NDArray[np.float32]]:
        """The network's state by its own names; raises WeightsError for scales that do not fit."""
        floats = {name: value.astype(np.float32) for name, value in self.state.items() if not name.endswith(SCALE)}
        for name, scale in self.state.items():
            if name.endswith(SCALE):
                filters = floats.get(name.removesuffix(SCALE), np.empty(0))
                if scale.shape != (*filters.shape[:1], *[1] * (filters.ndim - 1)):
                    raise WeightsError(f"The tensor {name} does not fit what it scales.")
                filters *= scale
        return floats


def save(
    path: Path, card: ModelCard, state: Tensors, images: NDArray[np.uint8], probabilities: NDArray[np.float32]
) -> None:
    """Writes the file whole or not at all; raises OSError."""
    tensors = {name: np.ascontiguousarray(value) for name, value in state.items()}
    tensors[REFERENCE_IMAGES] = np.ascontiguousarray(images)
    tensors[REFERENCE_PROBABILITIES] = np.ascontiguousarray(probabilities.astype(np.float32))
    described = card.model_dump(mode="json")
    metadata = {METADATA: json.dumps({"card": described, "digest": _digest(described, tensors)})}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    try:
        save_file(tensors, partial, metadata)
        partial.chmod(0o644)  # the library makes it private, but a service of another user reads it
        partial.replace(path)
    except SafetensorError as error:  # how the library reports a full disk
        raise OSError(f"{path} cannot be written: {error}.") from error
    finally:
        partial.unlink(missing_ok=True)


def load(path: Path) -> Weights:
    """Reads and checks the file; raises WeightsError with one sentence that names it."""
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
        described, digest = content["card"], content["digest"]
    except (KeyError, TypeError, ValueError) as error:
        raise WeightsError(f"{path} was not written by this project's training: it has no card.") from error
    if digest != _digest(described, tensors):
        raise WeightsError(f"{path} was altered after training: its digest does not fit its content.")
    try:
        card = ModelCard.model_validate(described)
        images, probabilities = tensors.pop(REFERENCE_IMAGES), tensors.pop(REFERENCE_PROBABILITIES)
    except (ValidationError, KeyError) as error:
        reason = error.errors()[0]["loc"] if isinstance(error, ValidationError) else error
        raise WeightsError(f"{path} has a card that cannot be served: {reason}.") from error
    shape = (len(images), card.input_size, card.input_size, 3)
    if not len(images) or images.shape != shape or probabilities.shape != (len(images), len(card.classes)):
        raise WeightsError(f"{path} has reference images that do not fit its card.")
    return Weights(card, tensors, images, probabilities, sha256)


def _digest(card: dict[str, Any], tensors: Tensors) -> str:
    digest = hashlib.sha256(json.dumps(card, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tensor.shape}\n".encode())
        digest.update(np.ascontiguousarray(tensor).tobytes())
    return digest.hexdigest()
