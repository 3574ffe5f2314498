"""OpenVINO on a CPU: the network as a graph made from the weights file, in int8 where the processor has it.

The graph repeats `networks.ConvNet.forward` after `networks.fold`; torch is not needed to serve it. Its int8 is that of
Jacob et al. 2018 (arXiv 1712.05877): each convolution's filters are rounded to 255 steps a channel, its input to 256
steps of the range that the weights file gives for it.

A few images run on all threads together. More are cut into slices, each computed by one thread: the threads meet once a
batch and not once a layer, so that none waits where the event loop takes a core for a while.
"""

from collections.abc import Mapping
from contextlib import ExitStack

import numpy as np
import openvino
from numpy.typing import NDArray
from openvino import opset13 as ops

from app.errors import SettingsError, WeightsError
from app.model import shares
from app.model.weights import Weights

Array = NDArray[np.float32]

SLICE = (4, 8)  # least and most images that one thread computes at a time: fewer cost more each, more share out badly
HINTS = {"int8": "bf16", "bfloat16": "bf16", "float32": "f32"}  # what int8 leaves over runs in bfloat16


class OpenVINOEngine:
    """Raises WeightsError for a file it cannot serve, SettingsError for a device that is not the CPU."""

    name = "openvino"
    device = "cpu"

    def __init__(self, weights: Weights, device: str, threads: int, precision: str) -> None:
        if device not in ("auto", "cpu"):
            raise SettingsError(f"THIRTYTWO_DEVICE: the openvino engine serves on the CPU, not on {device}.")
        if weights.card.architecture != "convnet":
            raise WeightsError(f"The openvino engine does not know the architecture {weights.card.architecture}.")
        if precision not in HINTS:
            raise SettingsError(f"THIRTYTWO_PRECISION: openvino serves in {', '.join(HINTS)}, not in {precision}.")
        self.precision = precision
        ranges = weights.card.activation_ranges if precision == "int8" else {}
        core, model = openvino.Core(), graph(weights, ranges)
        options = {"INFERENCE_PRECISION_HINT": HINTS[precision], "INFERENCE_NUM_THREADS": threads}
        together = core.compile_model(model, "CPU", {**options, "PERFORMANCE_HINT": "LATENCY"})
        self._threads = threads
        self._request = together.create_infer_request()
        self._streams = core.compile_model(model, "CPU", {**options, "NUM_STREAMS": threads}) if threads > 1 else None
        self._requests: list[openvino.InferRequest] = []  # one a slice; idle ones wait here

    def __call__(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        slices = shares.cut(len(images), self._threads, *SLICE)
        if self._streams is None or len(slices) == 1:
            probabilities: NDArray[np.float32] = self._request.infer({0: images}, share_inputs=True)[0]
            return probabilities
        while len(self._requests) < len(slices):
            self._requests.append(self._streams.create_infer_request())
        used = self._requests[: len(slices)]
        with ExitStack() as running:  # waits for all, even where one fails, since they read the caller's memory
            for request, part in zip(used, slices, strict=True):
                request.set_input_tensor(openvino.Tensor(images[part], shared_memory=True))
                request.start_async()
                running.callback(request.wait)
        return np.concatenate([request.get_output_tensor().data for request in used])

    def memory(self) -> None:
        return None


def graph(weights: Weights, ranges: Mapping[str, float]) -> openvino.Model:
    """uint8 [N, S, S, 3] to probabilities [N, classes]; convolutions with a range are quantised."""
    card = weights.card
    state = {name: value.astype(np.float32) for name, value in weights.state.items()}
    groups, depth = len(card.arguments["widths"]), card.arguments["depth"]
    images = ops.parameter([-1, card.input_size, card.input_size, 3], np.uint8)
    pixels = ops.transpose(ops.convert(images, "f32"), np.array([0, 3, 1, 2]))
    x = ops.gelu(_convolution(pixels, state, "whiten", ranges, padding=0), "erf")
    for group in range(groups):
        skip = None
        for i in range(depth):
            y = _convolution(x, state, f"groups.{group}.convs.{i}", ranges, padding=1)
            if i == 0:
                y = _halve(y)
            if i == depth - 1 and i > 1:
                y = ops.add(y, skip)
            x = ops.gelu(y, "erf")
            skip = skip or x
    features = ops.reduce_max(x, np.array([2, 3]))
    head = state["head.weight"] / (card.arguments["widths"][-1] * card.temperature)
    logits = ops.matmul(features, ops.constant(head), transpose_a=False, transpose_b=True)
    return openvino.Model([ops.softmax(logits, 1)], [images])


def _convolution(
    x: openvino.Node, state: Mapping[str, Array], name: str, ranges: Mapping[str, float], padding: int
) -> openvino.Node:
    filters, bias = state[f"{name}.weight"], state[f"{name}.bias"]
    kernel = ops.constant(filters)
    if name in ranges:
        top = ranges[name]
        x = _quantize(x, np.array(-top * 128 / 127, np.float32), np.array(top, np.float32), 256)
        largest: Array = np.abs(filters).max((1, 2, 3), keepdims=True)
        kernel = _quantize(kernel, -largest, largest, 255)
    pads = [padding, padding]
    y = ops.convolution(x, kernel, strides=[1, 1], pads_begin=pads, pads_end=pads, dilations=[1, 1])
    return ops.add(y, ops.constant(bias.reshape(1, -1, 1, 1)))


def _quantize(x: openvino.Node, low: Array, high: Array, levels: int) -> openvino.Node:
    ends = [ops.constant(np.broadcast_to(end, end.shape or (1,)).astype(np.float32)) for end in (low, high)]
    return ops.fake_quantize(x, *ends, *ends, levels)


def _halve(x: openvino.Node) -> openvino.Node:
    """Max pooling over 2 x 2 pixels."""
    none, two = [0, 0], [2, 2]
    pooled = ops.max_pool(x, strides=two, dilations=[1, 1], pads_begin=none, pads_end=none, kernel_shape=two)
    return pooled.output(0)
