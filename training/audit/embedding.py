"""Frozen features on the engine that serves: many times as fast as torch in float32, and precise enough to compare."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from app import engines
from app.engines.hardware import available_cpus
from training.features import load_backbone

BATCH = 256  # images

Array = NDArray[np.float32]


def embed(file: Path, images: NDArray[np.uint8]) -> Array:
    """Features float32 [N, D] of images uint8 [N, S, S, 3], where S is the input size of the weights file.

    They are the inputs of the head, in the precision of the CPU's engine. Raises WeightsError.
    """
    engines.block_usage_data()
    import openvino

    from app.engines.openvino import build_model, core, precision_hint

    backbone = load_backbone(file)
    precision = engines.openvino_precisions(backbone, "auto")[0]
    graph = build_model(backbone, backbone.card.activation_ranges if precision == "int8" else {})
    (features,) = (node for node in graph.get_ops() if node.get_type_name() == "ReduceMax")
    options = {"INFERENCE_NUM_THREADS": available_cpus(), "INFERENCE_PRECISION_HINT": precision_hint(precision)}
    model = openvino.Model([features.output(0)], graph.get_parameters())
    request = core().compile_model(model, "CPU", options).create_infer_request()
    parts = [request.infer({0: images[i : i + BATCH]})[0].copy() for i in range(0, len(images), BATCH)]
    return np.concatenate(parts) if parts else np.empty((0, backbone.card.arguments["widths"][-1]), np.float32)
