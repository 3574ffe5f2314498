"""Logits of many images, from one view or averaged over several."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Forward = Callable[[Tensor], Tensor]  # images [N, 3, H, W] with values 0..255 to logits [N, classes]


@torch.inference_mode()
def logits(network: nn.Module, images: Tensor, forward: Callable[[Forward, Tensor], Tensor] | None = None) -> Tensor:
    """float32 [N, classes] on the CPU for uint8 images [N, H, W, 3]; `forward` combines views, none means one."""
    network.eval()
    device = next(network.parameters()).device
    parts = []
    for part in images.split(1000):
        x = part.to(device).permute(0, 3, 1, 2)
        with torch.autocast(device.type, torch.bfloat16):
            parts.append((forward(network, x) if forward else network(x)).float().cpu())
    return torch.cat(parts)


def mirrored(network: Forward, images: Tensor) -> Tensor:
    """The mean of an image and its mirror image: two views."""
    return (network(images) + network(images.flip(3))) / 2


def six_views(network: Forward, images: Tensor) -> Tensor:
    """Both mirrored views of three shifts, the centre weighing half (Jordan 2024, arXiv 2404.00498, section 3.5)."""
    height, width = images.shape[2:]
    padded = F.pad(images.float(), (1, 1, 1, 1), "reflect")
    corners = [padded[:, :, :height, :width], padded[:, :, 2:, 2:]]
    return mirrored(network, images) / 2 + sum(mirrored(network, view) for view in corners) / 4
