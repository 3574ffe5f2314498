"""Eager PyTorch: the engine on CUDA and MPS, and on a CPU for architectures that OpenVINO does not support."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from app.engines import base
from app.engines.base import Output
from app.errors import DeviceError, DeviceLostError, WeightsError
from app.model import networks
from app.model.calibration import SMOOTHING_FLOOR
from app.model.ood import TENSORS, WHITENING
from app.model.weights import Weights


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
        network = load_network(weights).to(self._device, dtype)
        self._network = network.to(memory_format=torch.channels_last)
        self._calibration = weights.card.temperature, weights.card.label_smoothing_correction
        self._detector = weights.ood_detector()
        if self._detector:
            self._whitening = torch.from_numpy(weights.state[WHITENING]).to(self._device, torch.float32)

    def __call__(self, images: NDArray[np.uint8], exclusive: bool = True) -> Output:
        try:
            probabilities, ood = self._run(images)
        except torch.AcceleratorError as error:  # after a CUDA error every later call fails, too
            raise DeviceLostError(str(error).splitlines()[0]) from error
        return Output(probabilities, np.zeros(len(images), np.uint8), ood)

    @torch.inference_mode()
    def _run(self, images: NDArray[np.uint8]) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:
        batch = torch.from_numpy(images)
        if self._device.type == "cuda":
            batch = batch.pin_memory().to(self._device, non_blocking=True)
        pixels = batch.to(self._device).permute(0, 3, 1, 2)
        if self._detector is None:
            return calibrated_softmax(self._network(pixels).float(), *self._calibration).cpu().numpy(), None
        assert isinstance(self._network, networks.ConvNet)  # the only architecture with these scores
        logits, features = self._network.logits_and_means(pixels)
        probabilities = calibrated_softmax(logits, *self._calibration).cpu().numpy()
        whitened = (features @ self._whitening.T).cpu().numpy()
        return probabilities, self._detector.scores(probabilities, whitened)

    def prepare(self, sizes: Sequence[int], image: NDArray[np.uint8]) -> None:
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
    state = {name: torch.from_numpy(value) for name, value in weights.dequantized().items() if name not in TENSORS}
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise WeightsError(f"The tensors do not match a {card.architecture} with {card.arguments}.") from error
    return network


def available_device(name: str) -> torch.device:
    """The torch device of this name; raises DeviceError where it is unknown or not available."""
    try:
        device = torch.device(name)
    except RuntimeError:
        raise DeviceError(f"{name} is not a device.") from None
    available = {
        "cpu": True,
        "mps": torch.backends.mps.is_available(),
        "cuda": (device.index or 0) < torch.cuda.device_count(),
    }
    if not available.get(device.type):
        raise DeviceError(f"{name} is not available here.")
    return device


def pick_dtype(device: torch.device) -> torch.dtype:
    """The fastest dtype that the device computes in natively."""
    if device.type == "cpu":
        # torch has a public form of this query for CUDA only
        has_bfloat16: Any = torch.ops.mkldnn._is_mkldnn_bf16_supported()
        return torch.bfloat16 if has_bfloat16 else torch.float32
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return torch.float32
