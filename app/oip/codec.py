"""The protocol's bytes: request bodies to images, outputs to response bodies. Neither HTTP nor a model."""

from collections.abc import Iterable, Sequence
from math import prod
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError
from pydantic_core import to_json

from app.errors import MalformedUpload, TooLarge
from app.oip import content, number_arrays, outputs
from app.oip.number_arrays import Extracted
from app.oip.outputs import SelectedOutput, Values
from app.oip.schemas import InferenceRequest, Input
from app.oip.tensors import LENGTH, NO_SHARED_MEMORY, TensorSpec

MAX_JSON = 10_000_000  # bytes
NO_FILES_IN_JSON = (
    "JSON cannot hold a file: send it in binary (binary_data_size), or one as the whole body with "
    "Inference-Header-Content-Length: 0"
)

Pixels = NDArray[np.uint8]


class ParsedRequest(NamedTuple):
    """The images are an array uint8 [N, S, S, 3] or N encoded files; a timeout of 0 is none."""

    id: str | None
    images: Pixels | list[bytes]
    outputs: list[SelectedOutput]
    timeout_us: int = 0


def parse(
    body: bytes | memoryview,
    json_length: bytes | None,
    spec: TensorSpec,
    output_specs: Sequence[TensorSpec],
    max_images: int,
) -> ParsedRequest:
    """Reads any of the three forms: JSON alone; JSON of json_length bytes and binary data; 0 bytes and one raw image.

    Raises MalformedUpload, or TooLarge for more than max_images or MAX_JSON.
    """
    end = _json_end(json_length, len(body))
    rest = memoryview(body)[end:]
    if json_length is not None and end == 0:
        return ParsedRequest(None, _raw(rest, spec), [SelectedOutput(each, binary=True) for each in output_specs])
    if end > MAX_JSON:
        raise TooLarge(f"The JSON is over {MAX_JSON} bytes; send the data in binary.")
    text = number_arrays.split(bytes(body[:end]))
    request = _read(text)
    tensor = _only_input(request, spec)
    _check_shape(tensor, spec, len(body), max_images)
    images = _from_json(tensor, text) if tensor.data is not None else _from_binary(rest, tensor)
    if tensor.data is not None and rest:
        raise MalformedUpload(f"Unexpected additional input data: {len(rest)} bytes after the JSON.")
    return ParsedRequest(request.id, images, outputs.select(request, output_specs), request.parameters.timeout)


def encode(
    head: dict[str, Any], tensors: Iterable[tuple[SelectedOutput, Values]], classes: Sequence[str]
) -> tuple[bytes, int | None]:
    """The body of a response, and the length of its JSON if binary data follows."""
    encoded = [outputs.encode(output, values, classes) for output, values in tensors]
    text = [to_json({**head, "outputs": []}).removesuffix(b"]}")]
    for each in encoded:
        text += [*each.text, b","]
    text[-1] = b"]}"
    binary = [each.binary for each in encoded if each.binary]
    return b"".join(text + binary), sum(map(len, text)) if binary else None


def _json_end(json_length: bytes | None, available: int) -> int:
    if json_length is None:
        return available
    if not (json_length.isdigit() and len(json_length) < 20 and int(json_length) <= available):
        raise MalformedUpload(
            f"Inference-Header-Content-Length is {content.brief(json_length.decode('latin-1'))}; "
            f"it must be a whole number of at most the body's {available} bytes."
        )
    return int(json_length)


def _read(text: Extracted) -> InferenceRequest:
    try:
        return InferenceRequest.model_validate_json(text.rest)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        if first["loc"][-1:] == ("data",) and text.other:
            first["msg"] += f", not {content.of_json(text.other)}"
        where = ".".join(str(part) for part in first["loc"])
        raise MalformedUpload(f"{where}: {first['msg']}" if where else first["msg"]) from error


def _only_input(request: InferenceRequest, spec: TensorSpec) -> Input:
    if [tensor.name for tensor in request.inputs] != [spec.name]:
        names = content.brief(", ".join(tensor.name for tensor in request.inputs))
        raise MalformedUpload(f"The model has one input, '{spec.name}'; the request has {names}.")
    (tensor,) = request.inputs
    if tensor.datatype != spec.datatype:
        raise MalformedUpload(f"Input '{spec.name}' is of {spec.datatype}, not {content.brief(tensor.datatype)}.")
    if tensor.parameters.shared_memory_region is not None:
        raise MalformedUpload(NO_SHARED_MEMORY)
    if (tensor.data is None) == (tensor.parameters.binary_data_size is None):
        raise MalformedUpload(f"Input '{spec.name}' must have either data or binary_data_size.")
    return tensor


def _check_shape(tensor: Input, spec: TensorSpec, available: int, max_images: int) -> None:
    expected = list(spec.shape)
    if len(tensor.shape) != len(expected) or tensor.shape[1:] != expected[1:] or tensor.shape[0] == 0:
        raise MalformedUpload(
            f"Input '{spec.name}' has the shape {content.brief(tensor.shape)}; it must be {expected}."
        )
    if tensor.shape[0] > available:  # an image of less than a byte; checked before anything is sized by it
        raise MalformedUpload(f"Input '{spec.name}' has the shape {content.brief(tensor.shape)}, but not so much data.")
    if tensor.shape[0] > max_images:
        raise TooLarge(f"The request has more than {max_images} images.")


def _from_json(tensor: Input, text: Extracted) -> Pixels:
    given = tensor.data
    is_extracted = given is not None and len(given) == 1 and type(given[0]) is int and 0 <= given[0] < len(text.arrays)
    if tensor.datatype == "BYTES":
        found = "whole numbers" if is_extracted else content.of_json(text.other)
        raise MalformedUpload(f"The data of input '{tensor.name}' is {found}. {NO_FILES_IN_JSON}.")
    if given is None or not is_extracted:
        found = content.of_json(text.other)
        raise MalformedUpload(f"The data of input '{tensor.name}' is {found}; it must be whole numbers from 0 to 255.")
    return number_arrays.parse(text.arrays[given[0]], tensor.shape, tensor.name)


def _from_binary(rest: memoryview, tensor: Input) -> Pixels | list[bytes]:
    size = tensor.parameters.binary_data_size or 0
    if len(rest) < size:
        missing = content.brief(size - len(rest))
        raise MalformedUpload(f"Unexpected size for input '{tensor.name}', expecting {missing} additional bytes.")
    if len(rest) > size:
        raise MalformedUpload(f"Unexpected additional input data: {len(rest) - size} bytes after '{tensor.name}'.")
    if tensor.datatype == "BYTES":
        return _elements(rest, tensor)
    if size != prod(tensor.shape):
        raise MalformedUpload(
            f"binary_data_size is {size}; the shape {tensor.shape} has {prod(tensor.shape)} bytes.{_file_hint(rest)}"
        )
    return np.frombuffer(rest, np.uint8).reshape(tensor.shape)


def _elements(rest: memoryview, tensor: Input) -> list[bytes]:
    elements: list[bytes] = []
    position = 0
    for _ in range(tensor.shape[0]):
        begin = position + LENGTH.size
        position = begin + LENGTH.unpack_from(rest, position)[0] if begin <= len(rest) else begin
        if position > len(rest):
            found = content.of_file(bytes(rest[: content.SAMPLE]))
            hint = f" It is {found}, without the 4 bytes of its length before it." if found else ""
            raise MalformedUpload(f"Input '{tensor.name}' ends within its element {len(elements)}.{hint}")
        elements.append(bytes(rest[begin:position]))
    if position < len(rest):
        raise MalformedUpload(f"Input '{tensor.name}' has more bytes than its {tensor.shape[0]} elements.")
    return elements


def _raw(rest: memoryview, spec: TensorSpec) -> Pixels | list[bytes]:
    if spec.datatype == "BYTES":
        return [bytes(rest)]
    shape = (1, *spec.shape[1:])
    if len(rest) != prod(shape):
        raise MalformedUpload(f"The raw body has {len(rest)} bytes; one image has {prod(shape)}.{_file_hint(rest)}")
    return np.frombuffer(rest, np.uint8).reshape(shape)


def _file_hint(data: memoryview) -> str:
    found = content.of_file(bytes(data[: content.SAMPLE]))
    return f" The data is {found}; files are for the model whose input is BYTES." if found else ""
