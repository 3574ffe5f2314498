"""Frozen features on the engine that serves: many times as fast as torch in float32, and precise enough to compare."""

import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from app.engines.hardware import available_cpus, cpu_flags, pick_precision
from training.features import load_backbone

BATCH = 256  # images

Array = NDArray[np.float32]


def embed(file: Path, images: NDArray[np.uint8]) -> Array:
    """Features float32 [N, D] of images uint8 [N, S, S, 3], where S is the input size of the weights file.

    They are the inputs of the head, in the precision of the CPU's engine. Raises WeightsError.
    """
    sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]  # blocks its import: it sends usage data
    import openvino

    from app.engines.openvino import PRECISION_HINTS, _core, build_model  # one Core for the process: see there

    backbone = load_backbone(file)
    precision = pick_precision(cpu_flags()) if backbone.card.activation_ranges else "bfloat16"
    graph = build_model(backbone, backbone.card.activation_ranges if precision == "int8" else {})
    (features,) = (node for node in graph.get_ops() if node.get_type_name() == "ReduceMax")
    options = {"INFERENCE_NUM_THREADS": available_cpus(), "INFERENCE_PRECISION_HINT": PRECISION_HINTS[precision]}
    model = openvino.Model([features.output(0)], graph.get_parameters())
    request = _core().compile_model(model, "CPU", options).create_infer_request()
    parts = [request.infer({0: images[i : i + BATCH]})[0].copy() for i in range(0, len(images), BATCH)]
    return np.concatenate(parts) if parts else np.empty((0, backbone.card.arguments["widths"][-1]), np.float32)
