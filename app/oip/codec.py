"""The protocol's bytes: a request's body to images, probabilities to an answer's body. Knows no HTTP and no model."""

from collections.abc import Sequence
from itertools import chain
from math import prod
from struct import Struct
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError
from pydantic_core import to_json

from app.errors import MalformedUpload, TooLarge
from app.oip.schemas import InferenceRequest, Input

MAX_JSON = 10_000_000  # bytes; while JSON is parsed, nothing else runs: these take 0.1 s to 1 s
LENGTH = Struct("<I")  # before each element of a BYTES tensor
SHARED_MEMORY = "Shared memory is not supported; send the data with the request."

Pixels = NDArray[np.uint8]


class Tensor(NamedTuple):
    """What a model takes or gives; the first dimension is -1, any number of images."""

    name: str
    datatype: str
    shape: tuple[int, ...]


class Form(NamedTuple):
    """How the answer is wanted: after the JSON or in it; the `top` likeliest classes as text, or 0: probabilities."""

    binary: bool
    top: int = 0


class Inference(NamedTuple):
    """What a request asks for. The images are an array [N, S, S, 3] or N files; a timeout of 0 is none."""

    id: str | None
    images: Pixels | list[bytes]
    form: Form
    timeout_us: int = 0


def parse(body: bytes, json_length: bytes | None, takes: Tensor, gives: Tensor, max_images: int) -> Inference:
    """Reads any of the three forms: JSON alone; JSON of json_length bytes and binary data; 0 bytes and one raw image.

    Raises MalformedUpload, or TooLarge for more than max_images or MAX_JSON.
    """
    end = _json_end(json_length, len(body))
    rest = memoryview(body)[end:]
    if json_length is not None and end == 0:
        return Inference(None, _raw(rest, takes), Form(binary=True))
    request = _read(body[:end])
    given = _only_input(request, takes)
    _check_shape(given, takes, len(body), max_images)
    images = _from_json(given.data, given) if given.data is not None else _from_binary(rest, given)
    if given.data is not None and rest:
        raise MalformedUpload(f"Unexpected additional input data: {len(rest)} bytes after the JSON.")
    return Inference(request.id, images, _form(request, gives), request.parameters.timeout)


def encode(
    head: dict[str, Any], gives: Tensor, probabilities: NDArray[np.float32], form: Form, classes: Sequence[str]
) -> tuple[bytes, int | None]:
    """The body of an answer, and the length of its JSON where binary data follows."""
    if form.top:
        texts = _likeliest(probabilities, form.top, classes)
        data: list[Any] = texts
        binary = b"".join(LENGTH.pack(len(text)) + text for text in (text.encode() for text in texts))
        datatype, shape = "BYTES", [len(probabilities), len(texts) // len(probabilities)]
    else:
        data = probabilities.ravel().tolist()
        binary = probabilities.astype("<f4").tobytes()
        datatype, shape = gives.datatype, list(probabilities.shape)
    output = {"name": gives.name, "datatype": datatype, "shape": shape}
    if not form.binary:
        return to_json({**head, "outputs": [{**output, "data": data}]}), None
    text = to_json({**head, "outputs": [{**output, "parameters": {"binary_data_size": len(binary)}}]})
    return text + binary, len(text)


def _json_end(json_length: bytes | None, available: int) -> int:
    if json_length is None:
        return available
    if not (json_length.isdigit() and len(json_length) < 20 and int(json_length) <= available):
        raise MalformedUpload(
            f"Inference-Header-Content-Length is {_brief(json_length.decode('latin-1'))}; it must be a whole number "
            f"of at most the body's {available} bytes."
        )
    return int(json_length)


def _read(text: bytes) -> InferenceRequest:
    if len(text) > MAX_JSON:
        raise TooLarge(f"The JSON is over {MAX_JSON} bytes; send the data in binary.")
    try:
        return InferenceRequest.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise MalformedUpload(f"{where}: {first['msg']}" if where else first["msg"]) from error


def _only_input(request: InferenceRequest, takes: Tensor) -> Input:
    if [given.name for given in request.inputs] != [takes.name]:
        names = _brief(", ".join(given.name for given in request.inputs))
        raise MalformedUpload(f"The model takes one input, '{takes.name}'; the request has {names}.")
    (given,) = request.inputs
    if given.datatype != takes.datatype:
        raise MalformedUpload(f"Input '{takes.name}' is of {takes.datatype}, not {_brief(given.datatype)}.")
    if given.parameters.shared_memory_region is not None:
        raise MalformedUpload(SHARED_MEMORY)
    if (given.data is None) == (given.parameters.binary_data_size is None):
        raise MalformedUpload(f"Input '{takes.name}' must have either data or binary_data_size.")
    return given


def _check_shape(given: Input, takes: Tensor, available: int, max_images: int) -> None:
    wanted = list(takes.shape)
    if len(given.shape) != len(wanted) or given.shape[1:] != wanted[1:] or given.shape[0] == 0:
        raise MalformedUpload(f"Input '{takes.name}' has the shape {_brief(given.shape)}; it must be {wanted}.")
    if given.shape[0] > available:  # an image of less than a byte; checked before anything is sized by it
        raise MalformedUpload(f"Input '{takes.name}' has the shape {_brief(given.shape)}, but not so much data.")
    if given.shape[0] > max_images:
        raise TooLarge(f"The request has more than {max_images} images.")


def _from_json(data: list[Any], given: Input) -> Pixels | list[bytes]:
    values = _flat(data, given)
    kinds = set(map(type, values))
    if given.datatype == "BYTES":
        if kinds != {str}:
            raise MalformedUpload(f"The data of input '{given.name}' must be strings.")
        return [text.encode() for text in values]
    try:
        if kinds != {int}:
            raise ValueError
        return np.frombuffer(bytes(values), np.uint8).reshape(given.shape)
    except ValueError as error:
        raise MalformedUpload(f"The data of input '{given.name}' must be whole numbers from 0 to 255.") from error


def _flat(data: list[Any], given: Input) -> list[Any]:
    """The values row by row, whether they came flat or nested as the shape says."""
    nested = bool(data) and isinstance(data[0], list)
    level: list[Any] = [data]
    for length in given.shape if nested else [prod(given.shape)]:
        if not all(isinstance(part, list) and len(part) == length for part in level):
            raise MalformedUpload(f"The data of input '{given.name}' does not fit its shape {given.shape}.")
        level = list(chain.from_iterable(level))
    return level


def _from_binary(rest: memoryview, given: Input) -> Pixels | list[bytes]:
    size = given.parameters.binary_data_size or 0
    if len(rest) < size:
        missing = _brief(size - len(rest))
        raise MalformedUpload(f"Unexpected size for input '{given.name}', expecting {missing} additional bytes.")
    if len(rest) > size:
        raise MalformedUpload(f"Unexpected additional input data: {len(rest) - size} bytes after '{given.name}'.")
    if given.datatype == "BYTES":
        return _elements(rest, given)
    if size != prod(given.shape):
        raise MalformedUpload(f"binary_data_size is {size}; the shape {given.shape} has {prod(given.shape)} bytes.")
    return np.frombuffer(rest, np.uint8).reshape(given.shape)


def _elements(rest: memoryview, given: Input) -> list[bytes]:
    elements: list[bytes] = []
    position = 0
    for _ in range(given.shape[0]):
        begin = position + LENGTH.size
        position = begin + LENGTH.unpack_from(rest, position)[0] if begin <= len(rest) else begin
        if position > len(rest):
            raise MalformedUpload(f"Input '{given.name}' ends within its element {len(elements)}.")
        elements.append(bytes(rest[begin:position]))
    if position < len(rest):
        raise MalformedUpload(f"Input '{given.name}' has more bytes than its {given.shape[0]} elements.")
    return elements


def _raw(rest: memoryview, takes: Tensor) -> Pixels | list[bytes]:
    if takes.datatype == "BYTES":
        return [bytes(rest)]
    shape = (1, *takes.shape[1:])
    if len(rest) != prod(shape):
        raise MalformedUpload(f"The raw body has {len(rest)} bytes; one image has {prod(shape)}.")
    return np.frombuffer(rest, np.uint8).reshape(shape)


def _form(request: InferenceRequest, gives: Tensor) -> Form:
    names = [output.name for output in request.outputs]
    if not names:
        return Form(request.parameters.binary_data_output)
    if names != [gives.name]:
        given = _brief(", ".join(names))
        raise MalformedUpload(f"The model gives one output, '{gives.name}'; the request wants {given}.")
    parameters = request.outputs[0].parameters
    if parameters.shared_memory_region is not None:
        raise MalformedUpload(SHARED_MEMORY)
    binary = parameters.binary_data
    return Form(request.parameters.binary_data_output if binary is None else binary, parameters.classification)


def _likeliest(probabilities: NDArray[np.float32], top: int, classes: Sequence[str]) -> list[str]:
    """`value:index:label` of each image's likeliest classes, image by image."""
    order = np.argsort(-probabilities, axis=1, kind="stable")[:, : min(top, len(classes))]
    return [
        f"{row[i]:.6f}:{i}:{classes[i]}" for row, best in zip(probabilities, order.tolist(), strict=True) for i in best
    ]


def _brief(value: object) -> str:
    text = str(value) or "none"
    return text if len(text) <= 80 else f"{text[:80]}..."
