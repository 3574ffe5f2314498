"""The outputs of a model: which of them a request selects, and their tensors in the response."""

from collections.abc import Sequence
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic_core import to_json

from app.errors import MalformedUpload
from app.oip import content
from app.oip.schemas import InferenceRequest, Output
from app.oip.tensors import LENGTH, NO_SHARED_MEMORY, TensorSpec

Values = NDArray[np.float32]


class SelectedOutput(NamedTuple):
    """Its tensor is part of the JSON, or binary after it: numbers, or the `top` most probable classes as text."""

    spec: TensorSpec
    binary: bool
    top: int = 0  # 0: numbers


class EncodedOutput(NamedTuple):
    """The parts of the JSON object that describes a tensor, and the bytes that follow the JSON."""

    text: list[bytes]
    binary: bytes = b""


def select(request: InferenceRequest, specs: Sequence[TensorSpec]) -> list[SelectedOutput]:
    """The outputs that the request names, in its order, or all; raises MalformedUpload."""
    binary = request.parameters.binary_data_output
    selected: dict[str, SelectedOutput] = {}
    for output in request.outputs:
        if output.name in selected:
            raise MalformedUpload(f"The request names the output '{output.name}' twice.")
        selected[output.name] = _selected(output, specs, binary)
    return list(selected.values()) or [SelectedOutput(spec, binary) for spec in specs]


def encode(output: SelectedOutput, values: Values, classes: Sequence[str]) -> EncodedOutput:
    """Values float32 [N, classes], or [N]: one per image."""
    head = {"name": output.spec.name, "datatype": output.spec.datatype, "shape": list(values.shape)}
    if output.top:
        top = _top_k(values, output.top, classes)
        head |= {"datatype": "BYTES", "shape": [len(top), len(top[0])]}
        return _binary(head, _elements(top)) if output.binary else _json(head, top)
    if output.binary:
        return _binary(head, values.astype("<f4").tobytes())
    return _json(head, values.reshape(len(values), -1).tolist())


def _selected(output: Output, specs: Sequence[TensorSpec], binary: bool) -> SelectedOutput:
    spec = next((spec for spec in specs if spec.name == output.name), None)
    parameters = output.parameters
    if spec is None:
        names = " and ".join(f"'{spec.name}'" for spec in specs)
        raise MalformedUpload(f"The model has no output '{content.brief(output.name)}'; it has {names}.")
    if parameters.shared_memory_region is not None:
        raise MalformedUpload(NO_SHARED_MEMORY)
    if parameters.classification and len(spec.shape) == 1:
        raise MalformedUpload(f"The output '{spec.name}' is one number per image: it has no classification.")
    if parameters.binary_data is not None:
        binary = parameters.binary_data
    return SelectedOutput(spec, binary, parameters.classification)


def _json(head: dict[str, Any], rows: Sequence[Sequence[Any]]) -> EncodedOutput:
    """The data of the rows, one row per image."""
    data = b",".join(to_json(row)[1:-1] for row in rows)  # one call for all would hold the interpreter lock
    return EncodedOutput([to_json({**head, "data": []}).removesuffix(b"]}"), data, b"]}"])


def _binary(head: dict[str, Any], data: bytes) -> EncodedOutput:
    return EncodedOutput([to_json({**head, "parameters": {"binary_data_size": len(data)}})], data)


def _elements(rows: Sequence[Sequence[str]]) -> bytes:
    texts = (text.encode() for text in chain.from_iterable(rows))
    return b"".join(LENGTH.pack(len(text)) + text for text in texts)


def _top_k(probabilities: Values, top: int, classes: Sequence[str]) -> list[list[str]]:
    """`value:index:label` of each image's likeliest classes, image by image."""
    order = np.argsort(-probabilities, axis=1, kind="stable")[:, : min(top, len(classes))]
    return [
        [f"{row[i]:.6f}:{i}:{classes[i]}" for i in best]
        for row, best in zip(probabilities, order.tolist(), strict=True)
    ]
