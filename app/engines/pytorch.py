"""Eager torch: on CUDA, and on a CPU for what the faster engine does not know."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from app.errors import SettingsError, WeightsError
from app.model import networks
from app.model.weights import LEAST, Weights


class TorchEngine:
    """bfloat16 where the device computes in it, channels last."""

    name = "torch"
    streams = 1

    def __init__(self, weights: Weights, device: str, threads: int, precision: str = "auto") -> None:
        if precision == "int8":
            raise SettingsError("THIRTYTWO_PRECISION: int8 needs the openvino engine.")
        self._device = pick_device(device)
        self.device = str(self._device)
        if self._device.type == "cpu":
            torch.set_num_threads(threads)
        dtype = pick_dtype(self._device) if precision == "auto" else getattr(torch, precision)
        self.precision = str(dtype).removeprefix("torch.")
        network = load_network(weights).to(self._device, dtype)
        self._network = network.to(memory_format=torch.channels_last)
        self._calibration = weights.card.temperature, weights.card.label_smoothing_correction

    @torch.inference_mode()
    def __call__(self, images: NDArray[np.uint8], exclusive: bool = True) -> NDArray[np.float32]:
        batch = torch.from_numpy(images)
        if self._device.type == "cuda":
            batch = batch.pin_memory().to(self._device, non_blocking=True)
        logits = self._network(batch.to(self._device).permute(0, 3, 1, 2)).float()
        probabilities: NDArray[np.float32] = calibrate(logits, *self._calibration).cpu().numpy()
        return probabilities

    def memory(self) -> tuple[int, int] | None:
        if self._device.type != "cuda":
            return None
        free, total = torch.cuda.mem_get_info(self._device)
        return total - free, total


def calibrate(logits: Tensor, temperature: float, smoothing: float) -> Tensor:
    """Probabilities [N, classes] that tell how often they are right; their order is that of the logits.

    One temperature for all (Guo et al. 2017, arXiv 1706.04599), then label smoothing undone: a network that learnt
    targets with an even answer of weight s mixed in gives that mixture.
    """
    answer = (logits / temperature).softmax(1)
    left = torch.maximum(answer - smoothing / answer.shape[1], answer * LEAST)
    return left / left.sum(1, keepdim=True)


def load_network(weights: Weights) -> nn.Module:
    """The file's network in float32, in evaluation mode; raises WeightsError where the file's parts do not fit."""
    card = weights.card
    try:
        network = networks.fold_batchnorms(networks.build(card.architecture, card.arguments))
    except KeyError as error:
        raise WeightsError(f"The architecture {card.architecture!r} is not known to this version.") from error
    except (TypeError, ValueError, RuntimeError) as error:
        raise WeightsError(f"The arguments of {card.architecture} cannot be: {error}") from error
    state = {name: torch.from_numpy(value) for name, value in weights.dequantized().items()}
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise WeightsError(f"The tensors do not fit a {card.architecture} with {card.arguments}.") from error
    return network


def pick_device(name: str) -> torch.device:
    """`auto` is CUDA where there is one, else the CPU; raises SettingsError for a device that is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    present = {
        "cpu": True,
        "mps": torch.backends.mps.is_available(),
        "cuda": (device.index or 0) < torch.cuda.device_count(),
    }
    if not present[device.type]:
        raise SettingsError(f"THIRTYTWO_DEVICE: {name} is not available here.")
    return device


def pick_dtype(device: torch.device) -> torch.dtype:
    if device.type == "cpu":
        # public wrappers of this query exist only for CUDA
        fast: Any = torch.ops.mkldnn._is_mkldnn_bf16_supported()
        return torch.bfloat16 if fast else torch.float32
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return torch.float32
