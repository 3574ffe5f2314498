"""Engines run the network of a weights file on a device: uint8 pixels in, float32 probabilities out."""

import logging
import sys
from importlib.util import find_spec
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from app.engines.hardware import available_cpus, features, pick_precision
from app.errors import WeightsError
from app.model.weights import Weights

TOLERANCE = {"float32": 0.005, "float16": 0.02, "bfloat16": 0.05, "int8": 0.1}  # of a reference probability

logger = logging.getLogger(__name__)


class Engine(Protocol):
    name: str
    device: str
    precision: str
    streams: int  # threads that may call it at once

    def __call__(self, images: NDArray[np.uint8], exclusive: bool = True) -> NDArray[np.float32]:
        """Pixels uint8 [N, S, S, 3] to probabilities float32 [N, classes].

        `exclusive` lets the call use all cores; no other may run beside it then that says the same of itself.
        """
        ...

    def memory(self) -> tuple[int, int] | None:
        """Bytes in use, by whomever, and in total, of a device with memory of its own."""
        ...


def load(
    weights: Weights, device: str = "auto", threads: int = 0, name: str = "auto", precision: str = "auto"
) -> Engine:
    """The engine asked for, checked against the file's reference images.

    `auto` is OpenVINO on a CPU and torch elsewhere, or where OpenVINO cannot serve the file. Raises WeightsError or
    SettingsError where nothing can.
    """
    threads = threads or available_cpus()
    if name == "openvino" or (name == "auto" and _wants_openvino(device)):
        try:
            return verify_references(_openvino(weights, device, threads, precision), weights)
        except WeightsError as error:
            if name == "openvino":
                raise
            logger.warning("falling back to torch: %s", error)
    return verify_references(_torch(weights, device, threads, precision), weights)


def _wants_openvino(device: str) -> bool:
    if device not in ("auto", "cpu"):
        return False
    if find_spec("openvino") is None:
        logger.warning("falling back to torch: openvino is not installed")
        return False
    return device == "cpu" or not _has_cuda()


def _has_cuda() -> bool:
    """Asks the driver, since asking torch would cost its import."""
    from ctypes import CDLL, byref, c_int

    try:
        driver, count = CDLL("libcuda.so.1"), c_int()
        return driver.cuInit(0) == 0 and driver.cuDeviceGetCount(byref(count)) == 0 and count.value > 0
    except (OSError, AttributeError):
        return False


# an engine's library is imported only where it serves: torch takes two seconds and 300 MB


def _openvino(weights: Weights, device: str, threads: int, precision: str) -> Engine:
    sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]  # None bars its import, which reports home
    from app.engines.openvino import OpenVINOEngine

    chosen = pick_precision(features()) if precision == "auto" else precision
    if chosen == "int8" and precision == "auto" and not weights.card.activation_ranges:
        chosen = "bfloat16"
    return OpenVINOEngine(weights, device, threads, chosen)


def _torch(weights: Weights, device: str, threads: int, precision: str) -> Engine:
    if find_spec("torch") is None:
        raise WeightsError("Only torch can serve this, and it is not installed here.")
    from app.engines.pytorch import TorchEngine

    return TorchEngine(weights, device, threads, precision)


def verify_references(engine: Engine, weights: Weights) -> Engine:
    """Raises WeightsError where the engine misses the file's reference probabilities."""
    got = engine(weights.reference_images)
    worst = float(np.abs(got - weights.reference_probabilities).max())
    if not worst <= TOLERANCE[engine.precision]:  # NaN fails, too
        raise WeightsError(
            f"The {engine.name} engine on {engine.device} in {engine.precision} misses the file's reference "
            f"probabilities by {worst:.3f}; at most {TOLERANCE[engine.precision]} is allowed."
        )
    logger.info(
        "%s on %s in %s reproduces the reference images within %.4f",
        engine.name,
        engine.device,
        engine.precision,
        worst,
    )
    return engine
