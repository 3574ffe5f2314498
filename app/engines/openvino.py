"""OpenVINO on a CPU: the network as a graph built from the weights file, in int8 where the CPU has dot products for it.

Serving on a CPU needs no torch: `build_model` repeats `networks.ConvNet` after batch-norm folding. In int8, weights and
inputs of the groups' convolutions are on the grids of `app.model.quantization`, with the ranges of the weights file.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from queue import SimpleQueue

import numpy as np
import openvino
from numpy.typing import NDArray
from openvino import opset13 as ops

from app.engines import base
from app.engines.base import Output
from app.engines.hardware import cpu_flags, lower_priority, native_precisions
from app.errors import DeviceError, WeightsError
from app.model.calibration import SMOOTHING_FLOOR
from app.model.card import ModelCard
from app.model.ood import WHITENING
from app.model.quantization import ACTIVATION_LEVELS, WEIGHT_LEVELS, activation_bounds
from app.model.weights import Weights

Array = NDArray[np.float32]

MAX_STREAMS = 2  # measured on two cores
PRECISIONS = ("int8", "bfloat16", "float32")


class OpenVINOEngine:
    """An exclusive call uses all threads; concurrent calls use one stream each, with a share of the threads.

    In a batch on all threads, every layer waits for the thread that the event loop has preempted. Streams do not wait
    for each other, and their lower priority leaves the cores to the event loop, which must refuse requests in time.
    Raises WeightsError for an unsupported architecture, DeviceError for an unsupported device or precision.
    """

    name = "openvino"
    device = "cpu"

    def __init__(self, weights: Weights, device: str, threads: int, precision: str) -> None:
        if device != "cpu":
            raise DeviceError(f"The openvino engine runs on the CPU, not on {device}.")
        if weights.card.architecture != "convnet":
            raise WeightsError(f"The openvino engine does not support the architecture {weights.card.architecture}.")
        if precision not in PRECISIONS:
            raise DeviceError(f"The openvino engine runs in {', '.join(PRECISIONS)}, not in {precision}.")
        self.precision = precision
        self._sizes: list[int] = []
        self._detector = weights.ood_detector()
        self.streams = min(threads, MAX_STREAMS)
        model = build_model(weights, weights.card.activation_ranges if precision == "int8" else {})
        options = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": precision_hint(precision)}

        def create_requests(streams: int) -> list[openvino.InferRequest]:
            compiled = core().compile_model(model, "CPU", {**options, "NUM_STREAMS": streams})
            return [compiled.create_infer_request() for _ in range(streams)]

        with _low_priority_thread() as thread:
            (self._all_cores_request,) = stream_requests = thread.submit(create_requests, 1).result()
            if self.streams > 1:  # their threads inherit the priority
                stream_requests = thread.submit(create_requests, self.streams).result()
        self._stream_requests = SimpleQueue[openvino.InferRequest]()
        for request in stream_requests:
            self._stream_requests.put(request)

    def __call__(self, images: NDArray[np.uint8], exclusive: bool = True) -> Output:
        count = len(images)
        request = self._all_cores_request if exclusive else self._stream_requests.get()
        try:
            results = request.infer({0: base.pad(images, self._sizes)}, share_inputs=True)
            probabilities: Array = results[0][:count]
            ood = self._detector.scores(probabilities, results[1][:count]) if self._detector else None
        finally:
            if not exclusive:
                self._stream_requests.put(request)
        return Output(probabilities, np.zeros(count, np.uint8), ood)

    def prepare(self, sizes: Sequence[int], image: NDArray[np.uint8]) -> None:
        with _low_priority_thread() as thread:
            thread.submit(base.prepare, self, sizes, image).result()
        self._sizes = sorted(sizes)

    def memory(self) -> None:
        return None


def precision_hint(precision: str) -> str:
    """OpenVINO's name for the precision; for int8 that of the layers that are not quantised."""
    if precision == "int8":
        return "bf16" if "bfloat16" in native_precisions(cpu_flags()) else "f32"
    return {"bfloat16": "bf16", "float32": "f32"}[precision]


def _low_priority_thread() -> ThreadPoolExecutor:
    """For compilation and warm-up: another model may be serving. Both release the GIL, which others may wait for."""
    return ThreadPoolExecutor(1, "openvino", lower_priority)


@cache
def core() -> openvino.Core:
    """One Core for the process, made on a thread that handles no signals.

    Each Core gives its thread a signal stack, and destroying several frees one in use. Seen with 2026.4.1: the next
    signal, such as SIGTERM, then ends the process with a segmentation fault.
    """
    return openvino.Core()


def build_model(weights: Weights, ranges: Mapping[str, float]) -> openvino.Model:
    """uint8 [N, S, S, 3] to probabilities float32 [N, classes]; convolutions named in `ranges` are quantised.

    If the card has an out-of-distribution score, a second output has its whitened features float32 [N, D].

    Twin of `app.model.networks.ConvNet.forward` after `fold_batchnorms`: a change there needs one here. A property
    test compares the two over widths, depths and input sizes.
    """
    card = weights.card
    state = weights.dequantized()
    images = ops.parameter([-1, card.input_size, card.input_size, 3], np.uint8)
    pixels = ops.transpose(ops.convert(images, "f32"), np.array([0, 3, 1, 2]))
    x = ops.gelu(_convolution(pixels, state, "whiten", ranges, padding=0), "erf")
    means = []  # over the pixels of the inputs of all groups but the first
    for group in range(len(card.arguments["widths"])):
        # Quantised once: in int8 a second user of the unquantised tensor makes the network a fifth slower.
        x = _quantize(x, f"groups.{group}.convs.0", ranges)
        if group and card.ood:
            means.append(ops.reduce_mean(x, np.array([2, 3])))
        x = _group(x, state, group, card.arguments["depth"], ranges)
    features = ops.reduce_max(x, np.array([2, 3]))
    head = ops.constant(state["head.weight"] / card.arguments["widths"][-1])
    logits = ops.matmul(features, head, transpose_a=False, transpose_b=True)
    outputs = [calibrated_softmax(logits, card)]
    if card.ood:
        features = ops.concat(means, 1)
        outputs.append(ops.matmul(features, state[WHITENING], transpose_a=False, transpose_b=True))
    return openvino.Model(outputs, [images])


def _group(
    x: openvino.Node, state: Mapping[str, Array], group: int, depth: int, ranges: Mapping[str, float]
) -> openvino.Node:
    """`networks.ConvGroup`: [N, C, H, W], already quantised, to [N, C', H / 2, W / 2]."""
    skip = None
    for i in range(depth):
        name = f"groups.{group}.convs.{i}"
        y = _convolution(_quantize(x, name, ranges) if i else x, state, name, ranges, padding=1)
        if i == 0:
            y = _max_pool(y)
        if i == depth - 1 and i > 1:
            y = ops.add(y, skip)
        x = ops.gelu(y, "erf")
        skip = skip or x
    return x


def calibrated_softmax(logits: openvino.Node, card: ModelCard) -> openvino.Node:
    """The graph form of `app.model.calibration.calibrated_softmax`, with the card's constants."""
    softmax = ops.softmax(ops.divide(logits, np.float32(card.temperature)), 1)
    floor = np.float32(card.label_smoothing_correction / len(card.classes))
    corrected = ops.maximum(ops.subtract(softmax, floor), ops.multiply(softmax, np.float32(SMOOTHING_FLOOR)))
    return ops.divide(corrected, ops.reduce_sum(corrected, np.array([1]), keep_dims=True))


def _quantize(x: openvino.Node, name: str, ranges: Mapping[str, float]) -> openvino.Node:
    """The input of the convolution `name` in int8, if it has a range."""
    if name not in ranges:
        return x
    low, high = activation_bounds(ranges[name])
    return _fake_quantize(x, np.array(low, np.float32), np.array(high, np.float32), ACTIVATION_LEVELS)


def _convolution(
    x: openvino.Node, state: Mapping[str, Array], name: str, ranges: Mapping[str, float], padding: int
) -> openvino.Node:
    weight, bias = state[f"{name}.weight"], state[f"{name}.bias"]
    kernel = ops.constant(weight)
    if name in ranges:
        largest: Array = np.abs(weight).max((1, 2, 3), keepdims=True)
        kernel = _fake_quantize(kernel, -largest, largest, WEIGHT_LEVELS)
    pads = [padding, padding]
    y = ops.convolution(x, kernel, strides=[1, 1], pads_begin=pads, pads_end=pads, dilations=[1, 1])
    return ops.add(y, ops.constant(bias.reshape(1, -1, 1, 1)))


def _fake_quantize(x: openvino.Node, low: Array, high: Array, levels: int) -> openvino.Node:
    """OpenVINO's CPU plugin runs a convolution in int8 where both of its inputs come from such a node."""
    bounds = [ops.constant(np.broadcast_to(bound, bound.shape or (1,)).astype(np.float32)) for bound in (low, high)]
    return ops.fake_quantize(x, *bounds, *bounds, levels)


def _max_pool(x: openvino.Node) -> openvino.Node:
    """2 x 2 pixels, stride 2."""
    none, two = [0, 0], [2, 2]
    pooled = ops.max_pool(x, strides=two, dilations=[1, 1], pads_begin=none, pads_end=none, kernel_shape=two)
    # In float32 the CPU plugin moves an activation in front of the pooling, which is wrong for GELU: it is not
    # monotonic (2026.4.1: probabilities of the bundled network differ by 0.08). A maximum between them prevents it.
    return ops.maximum(pooled.output(0), np.finfo(np.float32).min)
