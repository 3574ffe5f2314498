"""Features of images from a trained network whose filters stay frozen: the inputs of a linear head."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.transforms.v2 import functional

from app.engines.pytorch import load_network
from app.errors import WeightsError
from app.model import weights
from app.model.networks import ConvNet
from app.model.weights import Weights
from training.ood import without_ood

BATCH = 64  # images; bounds the memory of the activations
MAGNIFICATION = 1.3

Array = NDArray[np.float32]


def load_backbone(file: Path) -> Weights:
    """The network of the file, or the largest network of a cascade, without its out-of-distribution score.

    A new head needs another score. Raises WeightsError where the network is no ConvNet.
    """
    loaded = weights.load(file)
    largest = max(loaded.networks or [loaded], key=lambda each: each.card.parameters)
    if largest.card.architecture != "convnet":
        raise WeightsError(f"{file} holds a network of architecture {largest.card.architecture}; a convnet is needed.")
    return without_ood(largest)


def extract_features(file: Path, images: Tensor) -> Array:
    """Features float32 [N, D] of images uint8 [N, S, S, 3], from the network of `load_backbone`."""
    network = load_network(load_backbone(file))
    assert isinstance(network, ConvNet)
    return network_features(network, images)


@torch.inference_mode()
def network_features(network: ConvNet, images: Tensor) -> Array:
    """The inputs of a folded network's head, float32 [N, D], for images uint8 [N, S, S, 3]."""
    width = network.head.in_features
    parts = [network.features(part.permute(0, 3, 1, 2)).numpy() for part in images.split(BATCH)]
    return np.concatenate(parts) if parts else np.empty((0, width), np.float32)


class Views(NamedTuple):
    """Features float32 [N, D] of images, of their horizontal flips, and of both magnified.

    Filters that were trained on the very images recognise them even where a head has not seen them, which makes
    cross-validated probabilities too confident. A magnified image is one that filters and head have not seen.
    """

    plain: Array
    flipped: Array
    magnified: Array
    magnified_flipped: Array


def extract_views(network: ConvNet, images: Tensor) -> Views:
    """Four passes of a folded network over images uint8 [N, S, S, 3]."""
    larger = magnify(images)
    views = (images, images.flip(2), larger, larger.flip(2))
    return Views(*(network_features(network, view) for view in views))


def magnify(images: Tensor) -> Tensor:
    """The central part of images uint8 [N, S, S, 3], 1 / MAGNIFICATION of their width, resized to S x S."""
    size = images.shape[1]
    planes = images.permute(0, 3, 1, 2)
    cropped = functional.center_crop(planes, [round(size / MAGNIFICATION)] * 2)
    resized: Tensor = functional.resize(cropped, [size, size], antialias=True)
    return resized.permute(0, 2, 3, 1)
