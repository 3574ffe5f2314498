"""Answers to many images: logits of a network in training, probabilities of an engine."""

import numpy as np
import torch
from torch import Tensor, nn

from app.engines import Engine

SERVED_BATCH = 64


@torch.inference_mode()
def logits(network: nn.Module, images: Tensor) -> Tensor:
    """float32 [N, classes] on the CPU for uint8 images [N, H, W, 3], one view an image."""
    network.eval()
    device = next(network.parameters()).device
    parts = []
    for part in images.split(1000):
        with torch.autocast(device.type, torch.bfloat16):
            parts.append(network(part.to(device).permute(0, 3, 1, 2)).float().cpu())
    return torch.cat(parts)


def served(run: Engine, images: Tensor) -> Tensor:
    """Probabilities float32 [N, classes] from an engine, one view an image, in batches as a service makes them."""
    parts = (np.ascontiguousarray(part.numpy()) for part in images.split(SERVED_BATCH))
    return torch.cat([torch.from_numpy(run(part)) for part in parts])
