"""OpenVINO on a CPU: the network as a graph made from the weights file, in int8 where the processor has it.

The graph repeats `networks.ConvNet.forward` after `networks.fold_batchnorms`, without torch. In int8, filters
and inputs of the groups' convolutions are rounded as `int8` describes, the inputs by the ranges in the weights file.
"""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue

import numpy as np
import openvino
from numpy.typing import NDArray
from openvino import opset13 as ops

from app.engines.hardware import lower_priority
from app.errors import SettingsError, WeightsError
from app.model.quantization import ACTIVATION_LEVELS, WEIGHT_LEVELS, activation_bounds
from app.model.weights import LEAST, Weights

Array = NDArray[np.float32]

MAX_STREAMS = 2  # at most; measured on two cores
HINTS = {"int8": "bf16", "bfloat16": "bf16", "float32": "f32"}  # what int8 leaves over runs in bfloat16


class OpenVINOEngine:
    """A lone call uses all threads; calls side by side have a share of them each, and none waits for another's.

    In a batch that all threads share, each waits after every layer for the one that the event loop has interrupted.
    Calls side by side leave the cores to the event loop when it wants them, or it could not even refuse in time.
    Raises WeightsError for a file it cannot serve, SettingsError for a device that is not the CPU.
    """

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
        self.streams = min(threads, MAX_STREAMS)
        core, model = openvino.Core(), graph(weights, ranges)
        options = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": HINTS[precision]}

        def requests(streams: int) -> list[openvino.InferRequest]:
            compiled = core.compile_model(model, "CPU", {**options, "NUM_STREAMS": streams})
            return [compiled.create_infer_request() for _ in range(streams)]

        (self._whole,) = requests(1)
        self._shares = SimpleQueue[openvino.InferRequest]()
        with ThreadPoolExecutor(1, initializer=lower_priority) as pool:  # the streams' threads inherit its priority
            for request in pool.submit(requests, self.streams).result() if self.streams > 1 else [self._whole]:
                self._shares.put(request)

    def __call__(self, images: NDArray[np.uint8], exclusive: bool = True) -> NDArray[np.float32]:
        request = self._whole if exclusive else self._shares.get()
        try:
            probabilities: NDArray[np.float32] = request.infer({0: images}, share_inputs=True)[0]
        finally:
            if not exclusive:
                self._shares.put(request)
        return probabilities

    def memory(self) -> None:
        return None


def graph(weights: Weights, ranges: Mapping[str, float]) -> openvino.Model:
    """uint8 [N, S, S, 3] to probabilities [N, classes]; convolutions with a range are quantised."""
    card = weights.card
    state = weights.dequantized()
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
    floor = card.label_smoothing_correction / len(card.classes)
    return openvino.Model([_sharpen(ops.softmax(logits, 1), floor)], [images])


def _sharpen(answer: openvino.Node, floor: float) -> openvino.Node:
    """`torch_engine.calibrate` after softmax."""
    left = ops.maximum(ops.subtract(answer, np.float32(floor)), ops.multiply(answer, np.float32(LEAST)))
    return ops.divide(left, ops.reduce_sum(left, np.array([1]), keep_dims=True))


def _convolution(
    x: openvino.Node, state: Mapping[str, Array], name: str, ranges: Mapping[str, float], padding: int
) -> openvino.Node:
    filters, bias = state[f"{name}.weight"], state[f"{name}.bias"]
    kernel = ops.constant(filters)
    if name in ranges:
        low, high = activation_bounds(ranges[name])
        x = _quantize(x, np.array(low, np.float32), np.array(high, np.float32), ACTIVATION_LEVELS)
        largest: Array = np.abs(filters).max((1, 2, 3), keepdims=True)
        kernel = _quantize(kernel, -largest, largest, WEIGHT_LEVELS)
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
