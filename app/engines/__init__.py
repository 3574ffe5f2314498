"""Engines run the model of a weights file on a device: uint8 images to float32 probabilities."""

import logging
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from itertools import pairwise
from typing import Any

import numpy as np

from app import memory
from app.engines.base import Engine, Output
from app.engines.cascade import CascadeEngine
from app.engines.hardware import available_cpus, cpu_flags, native_precisions, resolve_device
from app.engines.remote import RemoteEngine
from app.errors import DeviceError, WeightsError
from app.model.weights import Weights

__all__ = ["TOLERANCE", "CascadeEngine", "Engine", "Output", "load", "release", "verify_references"]

# Largest allowed difference from a reference probability, by precision.
TOLERANCE = {"float32": 0.005, "float16": 0.02, "bfloat16": 0.05, "int8": 0.1}

NO_TORCH = "The torch engine is not installed; it is the extra 'cuda': pip install '.[cuda]'."

logger = logging.getLogger(__name__)


class ReferenceMismatch(WeightsError):
    """An engine does not reproduce the file's reference probabilities in its precision."""


def load(
    weights: Weights,
    device: str = "auto",
    threads: int = 0,
    name: str = "auto",
    precision: str = "auto",
    early_exit: bool = True,
) -> Engine:
    """An engine that reproduces the file's reference probabilities; `threads` 0 means all available CPUs.

    `name` auto is OpenVINO on a CPU, and torch elsewhere or where OpenVINO cannot run the file. `precision` auto is the
    fastest one that reproduces the references. Without `early_exit` every image passes all stages of a cascade. Raises
    WeightsError or DeviceError where no engine can.
    """
    threads = threads or available_cpus()
    device = resolve_device(device)
    if name == "openvino" or (name == "auto" and _prefer_openvino(device)):
        try:
            return _load_fastest(weights, device, threads, openvino_precisions(weights, precision), early_exit)
        except WeightsError as error:
            if name == "openvino":
                raise
            if find_spec("torch") is None:
                raise WeightsError(f"{error} {NO_TORCH}") from error
            logger.warning("falling back to torch: %s", error)
    return _load("torch", weights, device, threads, precision, early_exit)


def verify_references(engine: Engine, weights: Weights, exclusive: bool = True) -> None:
    """Raises WeightsError where the engine's output differs too much from the file's reference probabilities.

    Every stage of a cascade is verified on every reference image: an image near a threshold may leave after another
    stage in another precision. A remote engine is verified by its process, which exits where this raises.
    """
    if isinstance(engine, RemoteEngine):
        engine.verify()
        return
    worst = reference_difference(engine, weights, exclusive)
    tolerance = TOLERANCE[engine.precision]
    where = f"{engine.name} on {engine.device} in {engine.precision}"
    if not worst <= tolerance:  # also for NaN
        raise ReferenceMismatch(
            f"The output of {where} differs from the file's reference probabilities by {worst:.3f}; "
            f"at most {tolerance} is allowed."
        )
    logger.info("%s reproduces the reference probabilities within %.4f", where, worst)


def reference_difference(engine: Engine, weights: Weights, exclusive: bool = True) -> float:
    """The largest difference of the engine's output from a reference probability; every stage of a cascade counts."""
    if isinstance(engine, CascadeEngine) and weights.reference_stages is not None:
        outputs = engine.run_stages(weights.reference_images, False, exclusive)
        probabilities = np.stack([output.probabilities for output in outputs])
        expected = weights.reference_stages
    else:
        probabilities = engine(weights.reference_images, exclusive).probabilities
        expected = weights.reference_probabilities
    return float(np.abs(probabilities - expected).max())


def release(references: list[Any], device: str) -> None:
    """Clears the last references to an engine of the device, and returns the memory of the process.

    An engine stops its threads then, so this is for a thread, not for an event loop.
    """
    references.clear()
    if device.startswith("cuda") and (torch := sys.modules.get("torch")):  # a front end has none
        torch.cuda.empty_cache()  # what torch keeps for later tensors
    memory.trim()


def block_usage_data() -> None:
    """To be called before the import of OpenVINO: it would import a package that sends usage data."""
    sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]  # Python's way to prevent an import


def _load_fastest(weights: Weights, device: str, threads: int, precisions: Sequence[str], early_exit: bool) -> Engine:
    """OpenVINO in the first of these precisions that reproduces the references; raises the last one's WeightsError."""
    for precision, slower in pairwise(precisions):
        try:
            return _load("openvino", weights, device, threads, precision, early_exit)
        except ReferenceMismatch as error:
            logger.warning("falling back from %s to %s: %s", precision, slower, error)
    return _load("openvino", weights, device, threads, precisions[-1], early_exit)


def openvino_precisions(weights: Weights, precision: str) -> list[str]:
    """The precisions to try, fastest first; raises DeviceError for int8 without the ranges that it needs."""
    has_ranges = all(each.card.activation_ranges for each in weights.networks or [weights])
    if precision == "int8" and not has_ranges:
        raise DeviceError("The weights file has no activation ranges, which int8 needs.")
    if precision != "auto":
        return [precision]
    return [each for each in native_precisions(cpu_flags()) if each != "int8" or has_ranges]


def _load(name: str, weights: Weights, device: str, threads: int, precision: str, early_exit: bool) -> Engine:
    load_network = _load_openvino if name == "openvino" else _load_torch
    engine: Engine
    if weights.card.stages:
        networks = [load_network(_uncalibrated(each), device, threads, precision) for each in weights.networks]
        engine = CascadeEngine(networks, weights.card.stages, early_exit)
    else:
        engine = load_network(weights, device, threads, precision)
    verify_references(engine, weights)
    return engine


def _uncalibrated(weights: Weights) -> Weights:
    """The network with its plain softmax: a cascade calibrates each of its stages."""
    plain = {"temperature": 1.0, "label_smoothing_correction": 0.0}
    return weights._replace(card=weights.card.model_copy(update=plain))


def _prefer_openvino(device: str) -> bool:
    if device != "cpu":
        return False
    if find_spec("openvino") is None:
        logger.warning("falling back to torch: openvino is not installed")
        return False
    return True


# Each engine's library is imported on use only: torch alone takes two seconds and 300 MB.


def _load_openvino(weights: Weights, device: str, threads: int, precision: str) -> Engine:
    block_usage_data()
    from app.engines.openvino import OpenVINOEngine

    return OpenVINOEngine(weights, device, threads, precision)


def _load_torch(weights: Weights, device: str, threads: int, precision: str) -> Engine:
    if find_spec("torch") is None:
        raise WeightsError(NO_TORCH)
    from app.engines.pytorch import TorchEngine

    return TorchEngine(weights, device, threads, precision)
