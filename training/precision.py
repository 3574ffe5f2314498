"""The numeric precision of training: bfloat16, float16 with loss scaling on GPUs without it, float32 on such CPUs."""

from typing import NamedTuple

import torch
from torch.amp.grad_scaler import GradScaler

from app.engines.pytorch import pick_dtype


class Precision(NamedTuple):
    """The dtype of activations within `autocast`, which float32 disables.

    The scaler multiplies the loss in float16 and is idle otherwise: loss scaling keeps small gradients above the
    smallest float16 (Micikevicius et al. 2018, arXiv 1710.03740).
    """

    device: torch.device
    dtype: torch.dtype
    scaler: GradScaler

    @classmethod
    def of(cls, device: torch.device, dtype: torch.dtype | None = None) -> "Precision":
        """What the device computes in natively: a CPU with AVX2 only emulates bfloat16, 30 times slower."""
        if dtype is None:
            dtype = torch.bfloat16 if device.type == "mps" else pick_dtype(device)
        return cls(device, dtype, GradScaler(device.type, enabled=dtype is torch.float16))

    def autocast(self) -> torch.autocast:
        enabled = self.dtype is not torch.float32
        return torch.autocast(self.device.type, self.dtype if enabled else torch.bfloat16, enabled=enabled)
