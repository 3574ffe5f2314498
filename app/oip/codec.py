"""The protocol's bytes: request bodies to images, probabilities to response bodies. Neither HTTP nor a model."""

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
from app.oip import content, number_arrays
from app.oip.number_arrays import Extracted
from app.oip.schemas import InferenceRequest, Input

MAX_JSON = 10_000_000  # bytes
END_OF_DATA = b"]}]}"  # and of its output, the outputs and the response
LENGTH = Struct("<I")  # before each element of a BYTES tensor
NO_FILES_IN_JSON = (
    "JSON cannot hold a file: send it in binary (binary_data_size), or one as the whole body with "
    "Inference-Header-Content-Length: 0"
)
SHARED_MEMORY = "Shared memory is not supported; send the data with the request."

Pixels = NDArray[np.uint8]


class TensorSpec(NamedTuple):
    """An input or output of a model; the first dimension is -1, any number of images."""

    name: str
    datatype: str
    shape: tuple[int, ...]


class OutputFormat(NamedTuple):
    """Whether the output follows the JSON in binary; the `top` most probable classes as text, or 0: probabilities."""

    binary: bool
    top: int = 0


class ParsedRequest(NamedTuple):
    """The images are an array uint8 [N, S, S, 3] or N encoded files; a timeout of 0 is none."""

    id: str | None
    images: Pixels | list[bytes]
    output_format: OutputFormat
    timeout_us: int = 0


def parse(
    body: bytes | memoryview, json_length: bytes | None, spec: TensorSpec, output_spec: TensorSpec, max_images: int
) -> ParsedRequest:
    """Reads any of the three forms: JSON alone; JSON of json_length bytes and binary data; 0 bytes and one raw image.

    Raises MalformedUpload, or TooLarge for more than max_images or MAX_JSON.
    """
    end = _json_end(json_length, len(body))
    rest = memoryview(body)[end:]
    if json_length is not None and end == 0:
        return ParsedRequest(None, _raw(rest, spec), OutputFormat(binary=True))
    if end > MAX_JSON:
        raise TooLarge(f"The JSON is over {MAX_JSON} bytes; send the data in binary.")
    text = number_arrays.split(bytes(body[:end]))
    request = _read(text)
    tensor = _only_input(request, spec)
    _check_shape(tensor, spec, len(body), max_images)
    images = _from_json(tensor, text) if tensor.data is not None else _from_binary(rest, tensor)
    if tensor.data is not None and rest:
        raise MalformedUpload(f"Unexpected additional input data: {len(rest)} bytes after the JSON.")
    return ParsedRequest(request.id, images, _output_format(request, output_spec), request.parameters.timeout)


def encode(
    head: dict[str, Any],
    output_spec: TensorSpec,
    probabilities: NDArray[np.float32],
    output_format: OutputFormat,
    classes: Sequence[str],
) -> tuple[bytes, int | None]:
    """The body of a response, and the length of its JSON if binary data follows."""
    rows: Sequence[Sequence[Any]]  # of the data, one an image
    if output_format.top:
        rows = _top_k(probabilities, output_format.top, classes)
        texts = list(chain.from_iterable(rows))
        binary = b"".join(LENGTH.pack(len(text)) + text for text in (text.encode() for text in texts))
        datatype, shape = "BYTES", [len(probabilities), len(texts) // len(probabilities)]
    else:
        rows = probabilities.tolist()
        binary = probabilities.astype("<f4").tobytes()
        datatype, shape = output_spec.datatype, list(probabilities.shape)
    output = {"name": output_spec.name, "datatype": datatype, "shape": shape}
    if not output_format.binary:
        text = to_json({**head, "outputs": [{**output, "data": []}]})
        data = b",".join(to_json(row)[1:-1] for row in rows)  # one call for all would hold the interpreter lock
        return text.removesuffix(END_OF_DATA) + data + END_OF_DATA, None
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
        names = _brief(", ".join(tensor.name for tensor in request.inputs))
        raise MalformedUpload(f"The model has one input, '{spec.name}'; the request has {names}.")
    (tensor,) = request.inputs
    if tensor.datatype != spec.datatype:
        raise MalformedUpload(f"Input '{spec.name}' is of {spec.datatype}, not {_brief(tensor.datatype)}.")
    if tensor.parameters.shared_memory_region is not None:
        raise MalformedUpload(SHARED_MEMORY)
    if (tensor.data is None) == (tensor.parameters.binary_data_size is None):
        raise MalformedUpload(f"Input '{spec.name}' must have either data or binary_data_size.")
    return tensor


def _check_shape(tensor: Input, spec: TensorSpec, available: int, max_images: int) -> None:
    expected = list(spec.shape)
    if len(tensor.shape) != len(expected) or tensor.shape[1:] != expected[1:] or tensor.shape[0] == 0:
        raise MalformedUpload(f"Input '{spec.name}' has the shape {_brief(tensor.shape)}; it must be {expected}.")
    if tensor.shape[0] > available:  # an image of less than a byte; checked before anything is sized by it
        raise MalformedUpload(f"Input '{spec.name}' has the shape {_brief(tensor.shape)}, but not so much data.")
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
        missing = _brief(size - len(rest))
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


def _output_format(request: InferenceRequest, output_spec: TensorSpec) -> OutputFormat:
    names = [output.name for output in request.outputs]
    if not names:
        return OutputFormat(request.parameters.binary_data_output)
    if names != [output_spec.name]:
        tensor = _brief(", ".join(names))
        raise MalformedUpload(f"The model has one output, '{output_spec.name}'; the request names {tensor}.")
    parameters = request.outputs[0].parameters
    if parameters.shared_memory_region is not None:
        raise MalformedUpload(SHARED_MEMORY)
    binary = parameters.binary_data
    return OutputFormat(request.parameters.binary_data_output if binary is None else binary, parameters.classification)


def _top_k(probabilities: NDArray[np.float32], top: int, classes: Sequence[str]) -> list[list[str]]:
    """`value:index:label` of each image's likeliest classes, image by image."""
    order = np.argsort(-probabilities, axis=1, kind="stable")[:, : min(top, len(classes))]
    return [
        [f"{row[i]:.6f}:{i}:{classes[i]}" for i in best]
        for row, best in zip(probabilities, order.tolist(), strict=True)
    ]


def _brief(value: object) -> str:
    text = str(value) or "none"
    return text if len(text) <= 80 else f"{text[:80]}..."
