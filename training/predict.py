"""Logits of many images."""

import torch
from torch import Tensor, nn


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
