"""The weights file: safetensors with a model card in its metadata. No pickle.

Tensors: the state of the network, or `networks.<i>.` and the state of each network of a cascade; `reference.images`
(uint8 [R, S, S, 3]) and `reference.probabilities` (float32 [R, classes]), which the service must reproduce before it is
ready; for a cascade also `reference.stages` (float32 [stages, R, classes]), the probabilities after each stage. The
state is in half precision; an int8 tensor is multiplied by `<name>.scale`, which has one number per output channel.
With `card.ood`, `ood.whitening` and `ood.means` are the tensors of the out-of-distribution score (app.model.ood).
Metadata: one entry, `thirtytwo`, a JSON object with the `card` (see ModelCard) and the `digest`, a SHA-256 over the
card and every tensor.
"""

import hashlib
import json
import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors import numpy as safetensors_numpy

from app.errors import WeightsError
from app.model.card import ConvNetArguments, ModelCard
from app.model.ood import MEANS, OodDetector

Tensors = dict[str, NDArray[Any]]

BUNDLED = Path(__file__).parents[1] / "assets" / "cifar10.safetensors"

METADATA = "thirtytwo"
SCALE = ".scale"
NETWORK = "networks.{}."
REFERENCE_IMAGES, REFERENCE_PROBABILITIES = "reference.images", "reference.probabilities"
REFERENCE_STAGES = "reference.stages"

MAX_FILE_BYTES = 256 << 20  # read into memory at start-up
MAX_HEADER_BYTES = 16 << 20  # holds the card; 10,000 class names of 200 characters are 2 MB
MAX_REFERENCES = 64  # images that every start runs


class Weights(NamedTuple):
    """Contents of a weights file; `state` as stored: half precision, or int8 with a scale."""

    card: ModelCard
    state: Tensors
    reference_images: NDArray[np.uint8]
    reference_probabilities: NDArray[np.float32]
    sha256: str
    reference_stages: NDArray[np.float32] | None = None

    @property
    def version(self) -> str:
        return self.sha256[:8]

    @property
    def networks(self) -> list["Weights"]:
        """The networks of a cascade, each with its own card and without reference probabilities."""
        parts = []
        for index, card in enumerate(self.card.networks):
            prefix = NETWORK.format(index)
            state = {name[len(prefix) :]: value for name, value in self.state.items() if name.startswith(prefix)}
            parts.append(Weights(card, state, self.reference_images, np.empty(0, np.float32), self.sha256))
        return parts

    def ood_detector(self) -> OodDetector | None:
        """Of a single network; None without an out-of-distribution score on the card."""
        if self.card.ood is None:
            return None
        return OodDetector(self.card.ood, self.state[MEANS].astype(np.float32))

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


def cascade_state(networks: Sequence[Weights]) -> Tensors:
    """The states of several networks under the names that a cascade's file has for them."""
    return {NETWORK.format(i) + name: value for i, each in enumerate(networks) for name, value in each.state.items()}


def save(
    path: Path,
    card: ModelCard,
    state: Tensors,
    images: NDArray[np.uint8],
    probabilities: NDArray[np.float32],
    stages: NDArray[np.float32] | None = None,
) -> None:
    """Writes the file atomically; raises OSError."""
    tensors = {name: np.ascontiguousarray(value) for name, value in state.items()}
    tensors[REFERENCE_IMAGES] = np.ascontiguousarray(images)
    tensors[REFERENCE_PROBABILITIES] = np.ascontiguousarray(probabilities.astype(np.float32))
    if stages is not None:
        tensors[REFERENCE_STAGES] = np.ascontiguousarray(stages.astype(np.float32))
    card_json = card.model_dump(mode="json")
    metadata = {METADATA: json.dumps({"card": card_json, "digest": _digest(card_json, tensors)})}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    try:
        safetensors_numpy.save_file(tensors, partial, metadata)
        partial.chmod(0o644)  # save_file makes it private; the service may run as another user
        partial.replace(path)
    except SafetensorError as error:  # safetensors reports a full disk this way
        raise OSError(f"{path} cannot be written: {error}.") from error
    finally:
        partial.unlink(missing_ok=True)


def load(path: Path) -> Weights:
    """Reads and verifies the file; raises WeightsError, one line that names it."""
    try:
        return _parse(_read(path))
    except OSError as error:
        raise WeightsError(f"{printable(path)} cannot be read: {error.strerror or error}.") from error
    except WeightsError as error:
        raise WeightsError(f"{printable(path)} {error}") from error


def _read(path: Path) -> bytes:
    """The whole file. A FIFO or device would block or never end, so only a regular file is read."""
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    with open(descriptor, "rb") as stream:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise WeightsError("is not a regular file.")
        if status.st_size > MAX_FILE_BYTES:
            raise WeightsError(f"has {status.st_size} bytes; at most {MAX_FILE_BYTES} are read.")
        return stream.read(MAX_FILE_BYTES + 1)


def _parse(data: bytes) -> Weights:
    try:
        content = json.loads(_header(data)["__metadata__"][METADATA])
        card_json, digest = content["card"], content["digest"]
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise WeightsError("was not written by this project's training: it has no card.") from error
    try:
        tensors = safetensors_numpy.load(data)
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise WeightsError(f"is not a safetensors file, or is cut off: {_one_line(error)}.") from error
    try:
        if digest != _digest(card_json, tensors):  # over the JSON as stored: field names change, files do not
            raise WeightsError("was altered after training: its digest does not match its content.")
        card = ModelCard.model_validate(card_json)
        images, probabilities = tensors.pop(REFERENCE_IMAGES), tensors.pop(REFERENCE_PROBABILITIES)
    except (ValidationError, KeyError, RecursionError) as error:
        raise WeightsError(f"has an invalid card: {_reason(error)}.") from error
    stages = tensors.pop(REFERENCE_STAGES, None)
    weights = Weights(card, tensors, images, probabilities, hashlib.sha256(data).hexdigest(), stages)
    _check_references(weights)
    if card.stages:
        _check_networks(weights)
    else:
        _check_state(weights)
    return weights


def _header(data: bytes) -> dict[str, Any]:
    """The safetensors header: 8 bytes of length, little endian, then JSON. Raises WeightsError or ValueError."""
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or length > min(MAX_HEADER_BYTES, len(data) - 8):
        raise WeightsError("is not a safetensors file, or is cut off.")
    header: dict[str, Any] = json.loads(data[8 : 8 + length])
    return header


def _check_references(weights: Weights) -> None:
    card, images, probabilities = weights.card, weights.reference_images, weights.reference_probabilities
    count = len(images)
    shape = (count, card.input_size, card.input_size, 3)
    if not 1 <= count <= MAX_REFERENCES or images.dtype != np.uint8 or images.shape != shape:
        raise WeightsError("has reference images that do not match its card.")
    if probabilities.dtype != np.float32 or probabilities.shape != (count, len(card.classes)):
        raise WeightsError("has reference probabilities that do not match its card.")
    stages = weights.reference_stages
    expected = (len(card.stages), *probabilities.shape) if card.stages else None
    if (None if stages is None else stages.shape) != expected or (stages is not None and stages.dtype != np.float32):
        raise WeightsError("has reference probabilities of stages that do not match its card.")
    if stages is not None and not np.array_equal(stages[-1], probabilities):
        raise WeightsError("has reference probabilities that are not those of its last stage.")


def _check_networks(weights: Weights) -> None:
    """Raises WeightsError, which names the network, where `_check_state` does, and for a tensor of no network."""
    prefixes = tuple(NETWORK.format(index) for index in range(len(weights.card.networks)))
    if surplus := [name for name in weights.state if not name.startswith(prefixes)]:
        raise WeightsError(f"has a tensor of no network on its card: {min(surplus)[:80]}.")
    for index, network in enumerate(weights.networks):
        try:
            _check_state(network)
        except WeightsError as error:
            raise WeightsError(f"{str(error).removesuffix('.')}, in network {index}.") from error


def _check_state(weights: Weights) -> None:
    """Raises WeightsError for missing, surplus, misshapen or non-finite tensors, as far as the card determines them."""
    state = weights.dequantized()
    if not all(np.isfinite(value).all() for value in state.values()):
        raise WeightsError("has a tensor with non-finite values.")
    if weights.card.architecture != "convnet":
        return
    arguments = ConvNetArguments.model_validate(weights.card.arguments)
    shapes = arguments.shapes() | (arguments.ood_shapes() if weights.card.ood else {})
    for name in sorted(shapes.keys() | state.keys()):
        if name not in state or name not in shapes or state[name].shape != shapes[name]:
            found = state[name].shape if name in state else "missing"
            raise WeightsError(f"has tensors that do not match its card: {name[:80]} is {found}.")
    if unknown := weights.card.activation_ranges.keys() - {name.removesuffix(".weight") for name in shapes}:
        raise WeightsError(f"has an activation range of an unknown layer: {min(unknown)[:80]}.")


def _digest(card: dict[str, Any], tensors: Tensors) -> str:
    digest = hashlib.sha256(json.dumps(card, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tensor.shape}\n".encode())
        digest.update(np.ascontiguousarray(tensor).tobytes())
    return digest.hexdigest()


def _reason(error: Exception) -> str:
    if not isinstance(error, ValidationError):
        return _one_line(error)
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    return _one_line(f"{where}: {first['msg']}" if where else first["msg"])


def _one_line(value: object) -> str:
    return " ".join(str(value).split())[:200]


def printable(path: Path) -> str:
    """The path on one line, without control characters."""
    return str(path) if str(path).isprintable() else repr(str(path))
