"""Eager PyTorch: the engine on CUDA and MPS, and on a CPU for architectures that OpenVINO does not support."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from app.engines import base, cuda
from app.engines.base import Output
from app.engines.cuda import Driver, Torch
from app.errors import DeviceError, DeviceLostError, WeightsError
from app.model import networks
from app.model.calibration import SMOOTHING_FLOOR
from app.model.weights import Weights

BFLOAT16_CAPABILITY = (8, 0)  # Ampere; earlier GPUs emulate it


class TorchEngine:
    """Channels last; bfloat16 or float16 where the device computes in it natively.

    Raises WeightsError for a network that cannot be built, DeviceError for an unavailable device or precision.
    """

    name = "torch"
    streams = 1

    def __init__(self, weights: Weights, device: str, threads: int, precision: str = "auto") -> None:
        if precision == "int8":
            raise DeviceError("Precision int8 needs the openvino engine.")
        self._device = available_device(device)
        self.device = str(self._device)
        if self._device.type == "cpu":
            torch.set_num_threads(threads)
        dtype = pick_dtype(self._device) if precision == "auto" else getattr(torch, precision)
        self.precision = str(dtype).removeprefix("torch.")
        with start_errors(self._device):
            network = load_network(weights).to(self._device, dtype)
            self._network = network.to(memory_format=torch.channels_last)
        self._calibration = weights.card.temperature, weights.card.label_smoothing_correction

    def __call__(self, images: NDArray[np.uint8], exclusive: bool = True) -> Output:
        try:
            probabilities = self._probabilities(images)
        except RuntimeError as error:
            if is_device_lost(error):
                raise DeviceLostError(_line(error)) from error
            raise
        return Output(probabilities, np.zeros(len(images), np.uint8))

    @torch.inference_mode()
    def _probabilities(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        batch = torch.from_numpy(images)
        if self._device.type == "cuda":
            batch = batch.pin_memory().to(self._device, non_blocking=True)
        logits = self._network(batch.to(self._device).permute(0, 3, 1, 2)).float()
        probabilities: NDArray[np.float32] = calibrated_softmax(logits, *self._calibration).cpu().numpy()
        return probabilities

    def prepare(self, sizes: Sequence[int], image: NDArray[np.uint8]) -> None:
        with start_errors(self._device):
            base.prepare(self, sizes, image)

    def memory(self) -> tuple[int, int] | None:
        if self._device.type != "cuda":
            return None
        free, total = torch.cuda.mem_get_info(self._device)
        return total - free, total


def calibrated_softmax(logits: Tensor, temperature: float, smoothing_correction: float) -> Tensor:
    """The torch form of `app.model.calibration.calibrated_softmax`: float32 [N, classes] to [N, classes]."""
    softmax = (logits / temperature).softmax(1)
    corrected = torch.maximum(softmax - smoothing_correction / softmax.shape[1], softmax * SMOOTHING_FLOOR)
    return corrected / corrected.sum(1, keepdim=True)


def load_network(weights: Weights) -> nn.Module:
    """The folded network in float32 and evaluation mode; raises WeightsError where card and tensors do not match."""
    card = weights.card
    try:
        network = networks.fold_batchnorms(networks.build(card.architecture, card.arguments))
    except KeyError as error:
        raise WeightsError(f"The architecture {card.architecture!r} is not supported by this version.") from error
    except (TypeError, ValueError, RuntimeError) as error:
        raise WeightsError(f"Invalid arguments of {card.architecture}: {error}") from error
    state = {name: torch.from_numpy(value) for name, value in weights.dequantized().items()}
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise WeightsError(f"The tensors do not match a {card.architecture} with {card.arguments}.") from error
    return network


def available_device(
    name: str,
    query_driver: Callable[[], Driver | None] = cuda.query_driver,
    query_torch: Callable[[int], Torch | None] = cuda.query_torch,
) -> torch.device:
    """The torch device of this name; raises DeviceError where it is unknown or not available, with the reason."""
    try:
        device = torch.device(name)
    except RuntimeError:
        raise DeviceError(f"{name} is not a device.") from None
    if device.type == "cuda":
        index = device.index or 0
        found = query_torch(index)
        if reason := cuda.obstacle(query_driver(), found):
            raise DeviceError(f"{name} is not available here: {reason}.")
        if found and index >= found.devices:
            raise DeviceError(f"{name} is not available here: the number of GPUs is {found.devices}.")
    elif device.type != "cpu" and not (device.type == "mps" and torch.backends.mps.is_available()):
        raise DeviceError(f"{name} is not available here.")
    return device


def pick_dtype(
    device: torch.device, capability: Callable[[torch.device], tuple[int, int]] | None = None
) -> torch.dtype:
    """The fastest dtype that the device computes in natively; `capability` queries a GPU's compute capability."""
    if device.type == "cpu":
        # torch has a public form of this query for CUDA only
        has_bfloat16: Any = torch.ops.mkldnn._is_mkldnn_bf16_supported()
        return torch.bfloat16 if has_bfloat16 else torch.float32
    if device.type == "cuda":
        capability = capability or torch.cuda.get_device_capability
        return torch.bfloat16 if capability(device) >= BFLOAT16_CAPABILITY else torch.float16
    return torch.float32


def is_device_lost(error: RuntimeError) -> bool:
    """Whether every later CUDA call of the process fails, too. Lack of memory is no such error.

    torch 2.8 and later raise AcceleratorError, a RuntimeError, earlier ones RuntimeError with the same text.
    """
    text = str(error)
    return text.startswith("CUDA error") and "out of memory" not in text.partition("\n")[0]


@contextmanager
def start_errors(device: torch.device) -> Iterator[None]:
    """Errors of the device while an engine is built become a DeviceError of one line."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise DeviceError(f"{device} has too little memory; a smaller MAX_BATCH needs less: {_line(error)}") from error
    except (RuntimeError, DeviceLostError) as error:
        if not str(error).startswith("CUDA"):
            raise
        raise DeviceError(f"{device} cannot run the network: {_line(error)}") from error


def _line(error: Exception) -> str:
    return str(error).partition("\n")[0].partition(" See https")[0]
