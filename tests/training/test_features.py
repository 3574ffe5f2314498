"""Frozen features: the inputs of the head, from the largest network of a file."""

import numpy as np
import torch

from app.engines.pytorch import load_network
from app.model.networks import ConvNet
from app.model.weights import BUNDLED
from training.features import extract_features, load_backbone, magnify


def test_features_times_head_are_the_logits() -> None:
    images = torch.randint(0, 256, (3, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    network = load_network(load_backbone(BUNDLED))
    assert isinstance(network, ConvNet)
    features = extract_features(BUNDLED, images)
    width = network.head.in_features
    assert features.shape == (3, width)
    with torch.inference_mode():
        logits = network(images.permute(0, 3, 1, 2)).numpy()
    np.testing.assert_allclose(features @ network.head.weight.detach().numpy().T / width, logits, atol=1e-4)


def test_no_images_have_no_features() -> None:
    assert extract_features(BUNDLED, torch.empty(0, 32, 32, 3, dtype=torch.uint8)).shape[0] == 0


def test_magnified_image_shows_the_centre() -> None:
    image = torch.zeros(1, 32, 32, 3, dtype=torch.uint8)
    image[:, 8:24, 8:24] = 200
    larger = magnify(image)
    assert larger.shape == image.shape
    assert larger.float().mean() > 1.5 * image.float().mean()
    assert torch.equal(larger[:, 0, 0], image[:, 0, 0])
