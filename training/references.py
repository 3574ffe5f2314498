"""A weights file's network under another card, with the reference probabilities that follow from it."""

from typing import Any

import numpy as np
import torch

from app.engines.pytorch import calibrate, load_network
from app.model.weights import Weights


def recarded(weights: Weights, **changes: Any) -> Weights:
    """With these changes to the card."""
    weights = weights._replace(card=weights.card.model_copy(update=changes))
    return weights._replace(reference_probabilities=_exact(weights, weights.reference_images))


def uncalibrated(weights: Weights) -> Weights:
    """Answers as the network was trained to give them, before they were calibrated."""
    return recarded(weights, temperature=1.0, smoothing=0.0)


@torch.inference_mode()
def _exact(weights: Weights, images: np.ndarray) -> np.ndarray:
    """Probabilities of the stored weights in float32 on the CPU."""
    network = load_network(weights)
    logits = network(torch.from_numpy(images).permute(0, 3, 1, 2))
    return calibrate(logits, weights.card.temperature, weights.card.smoothing).numpy()
