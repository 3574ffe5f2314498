"""Engines run the network of a weights file on a device: uint8 pixels in, float32 probabilities out."""

import os
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from app.errors import SettingsError, WeightsError
from app.model import networks
from app.model.weights import Weights

Probabilities = NDArray[np.float32]


class Engine(Protocol):
    name: str
    device: str
    precision: str

    def __call__(self, images: NDArray[np.uint8]) -> Probabilities:
        """Pixels uint8 [N, S, S, 3] to probabilities float32 [N, classes]."""
        ...


class TorchEngine:
    """Eager torch with batch normalisation folded into the filters; bfloat16 where the processor computes in it."""

    name = "torch"

    def __init__(self, weights: Weights, device: str, threads: int) -> None:
        self._device = pick_device(device)
        self.device = str(self._device)
        if self._device.type == "cpu":
            torch.set_num_threads(threads or available_cpus())
        dtype = pick_dtype(self._device)
        self.precision = str(dtype).removeprefix("torch.")
        network = networks.fold(load_network(weights)).eval()
        self._network = network.to(self._device, dtype).to(memory_format=torch.channels_last)
        self._temperature = weights.card.temperature

    @torch.inference_mode()
    def __call__(self, images: NDArray[np.uint8]) -> Probabilities:
        batch = torch.from_numpy(images).to(self._device).permute(0, 3, 1, 2)
        logits: Tensor = self._network(batch).float() / self._temperature
        return logits.softmax(1).cpu().numpy()


def load_network(weights: Weights) -> nn.Module:
    """The file's network in float32; raises WeightsError where description and tensors do not fit."""
    card = weights.card
    try:
        network = networks.build(card.architecture, card.arguments)
    except KeyError as error:
        raise WeightsError(f"The architecture {card.architecture!r} is not known to this version.") from error
    except (TypeError, ValueError, RuntimeError) as error:
        raise WeightsError(f"The arguments of {card.architecture} cannot be: {error}") from error
    state = {name: torch.from_numpy(value) for name, value in weights.state.items()}
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


def available_cpus() -> int:
    """CPUs this process may use: its affinity mask, and the cgroup's quota where one is set."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        with open("/sys/fs/cgroup/cpu.max") as file:
            quota, period = file.read().split()
    except (OSError, ValueError):
        return cpus
    return cpus if quota == "max" else max(1, min(cpus, int(quota) // int(period)))
