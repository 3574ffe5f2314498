"""The numeric precision of training: bfloat16, or float16 with loss scaling on GPUs without it."""

from typing import NamedTuple

import torch
from torch.amp.grad_scaler import GradScaler

from app.engines.pytorch import pick_dtype


class Precision(NamedTuple):
    """The dtype of activations within `autocast`; the scaler multiplies the loss in float16 and is idle otherwise.

    Loss scaling keeps small gradients above the smallest float16 (Micikevicius et al. 2018, arXiv 1710.03740).
    """

    device: torch.device
    dtype: torch.dtype
    scaler: GradScaler

    @classmethod
    def of(cls, device: torch.device, dtype: torch.dtype | None = None) -> "Precision":
        """float16 on GPUs that do not compute in bfloat16, else bfloat16."""
        if dtype is None:
            dtype = pick_dtype(device) if device.type == "cuda" else torch.bfloat16
        return cls(device, dtype, GradScaler(device.type, enabled=dtype is torch.float16))

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype)
