"""Engines run the network of a weights file on a device: uint8 images to float32 probabilities."""

import logging
import sys
from importlib.util import find_spec
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from app.engines.hardware import available_cpus, cpu_flags, pick_precision, resolve_device
from app.errors import WeightsError
from app.model.weights import Weights

# Largest allowed difference from a reference probability, by precision.
TOLERANCE = {"float32": 0.005, "float16": 0.02, "bfloat16": 0.05, "int8": 0.1}

logger = logging.getLogger(__name__)


class Engine(Protocol):
    """A network on a device. `streams` is the number of threads that may call it concurrently."""

    name: str
    device: str
    precision: str
    streams: int

    def __call__(self, images: NDArray[np.uint8], exclusive: bool = True) -> NDArray[np.float32]:
        """Images uint8 [N, S, S, 3] to probabilities float32 [N, classes].

        An exclusive call may use all cores; at most one exclusive call runs at a time.
        """
        ...

    def memory(self) -> tuple[int, int] | None:
        """(bytes used by all processes, bytes in total) of a device with its own memory, else None."""
        ...


def load(
    weights: Weights, device: str = "auto", threads: int = 0, name: str = "auto", precision: str = "auto"
) -> Engine:
    """An engine that reproduces the file's reference probabilities; `threads` 0 means all available CPUs.

    `name` auto is OpenVINO on a CPU, and torch elsewhere or where OpenVINO cannot run the file. Raises WeightsError
    or DeviceError where no engine can.
    """
    threads = threads or available_cpus()
    device = resolve_device(device)
    if name == "openvino" or (name == "auto" and _prefer_openvino(device)):
        try:
            return verify_references(_load_openvino(weights, device, threads, precision), weights)
        except WeightsError as error:
            if name == "openvino":
                raise
            logger.warning("falling back to torch: %s", error)
    return verify_references(_load_torch(weights, device, threads, precision), weights)


def verify_references(engine: Engine, weights: Weights) -> Engine:
    """Raises WeightsError where the engine's output differs too much from the file's reference probabilities."""
    probabilities = engine(weights.reference_images)
    worst = float(np.abs(probabilities - weights.reference_probabilities).max())
    tolerance = TOLERANCE[engine.precision]
    where = f"{engine.name} on {engine.device} in {engine.precision}"
    if not worst <= tolerance:  # also for NaN
        raise WeightsError(
            f"The output of {where} differs from the file's reference probabilities by {worst:.3f}; "
            f"at most {tolerance} is allowed."
        )
    logger.info("%s reproduces the reference probabilities within %.4f", where, worst)
    return engine


def _prefer_openvino(device: str) -> bool:
    if device != "cpu":
        return False
    if find_spec("openvino") is None:
        logger.warning("falling back to torch: openvino is not installed")
        return False
    return True


# Each engine's library is imported on use only: torch alone takes two seconds and 300 MB.


def _load_openvino(weights: Weights, device: str, threads: int, precision: str) -> Engine:
    sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]  # blocks its import: it sends usage data
    from app.engines.openvino import OpenVINOEngine

    chosen = pick_precision(cpu_flags()) if precision == "auto" else precision
    if chosen == "int8" and precision == "auto" and not weights.card.activation_ranges:
        chosen = "bfloat16"
    return OpenVINOEngine(weights, device, threads, chosen)


def _load_torch(weights: Weights, device: str, threads: int, precision: str) -> Engine:
    if find_spec("torch") is None:
        raise WeightsError("Only the torch engine supports this, and torch is not installed.")
    from app.engines.pytorch import TorchEngine

    return TorchEngine(weights, device, threads, precision)
