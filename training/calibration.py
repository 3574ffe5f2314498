"""What is measured on held-out images once a network is trained: ranges for int8, temperature and smoothing."""

from collections.abc import Callable, Iterator
from functools import partial
from math import exp, log
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from app.engines import Engine
from app.engines.pytorch import calibrated_softmax, load_network
from app.model.networks import ConvNet
from app.model.quantization import ACTIVATION_LEVELS, GELU_MIN, activation_bounds
from app.model.weights import Weights
from training import augment, metrics
from training.data import Split
from training.metrics import SERVED_BATCH

CALIBRATION_QUALITY = 80  # of JPEG
SMALLEST = 1e-30  # of a probability before its logarithm is taken
SMOOTHINGS = [step / 100 for step in range(21)]  # that a calibration is chosen from
CANDIDATES = [0.95**i for i in range(45)]  # of the largest input
EVERY = 13  # one of so many inputs is looked at; a prime that few layers' sizes are multiples of


def convolutions(network: nn.Module) -> Iterator[tuple[str, nn.Conv2d]]:
    """Those of a ConvNet's groups, which are stored and served in int8, by name; none of other networks."""
    if isinstance(network, ConvNet):
        for name, module in network.groups.named_modules(prefix="groups"):
            if isinstance(module, nn.Conv2d):
                yield name, module


@torch.inference_mode()
def input_ranges(network: nn.Module, images: Tensor) -> dict[str, float]:
    """The largest input that each convolution should tell apart, from what it gets for images uint8 [N, S, S, 3].

    The one with the least squared error, rounding and clipping together (Choukroun et al. 2019, arXiv 1902.06822): the
    few largest inputs would make steps too coarse for all others.
    """
    inputs = {name: list[Tensor]() for name, _ in convolutions(network)}

    def note(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _, given: inputs[name].append(given[0].flatten()[::EVERY].clone())

    hooks = [module.register_forward_pre_hook(note(name)) for name, module in convolutions(network)]
    for part in images.split(SERVED_BATCH):
        network(part.permute(0, 3, 1, 2))
    for hook in hooks:
        hook.remove()
    return {name: best_range(torch.cat(parts)) for name, parts in inputs.items()}


def best_range(inputs: Tensor) -> float:
    """The largest input to tell apart that rounds these float32 [N] with the least squared error."""
    largest = max(inputs.max().item(), -GELU_MIN)  # above 0 even where a layer before it has died
    return min((share * largest for share in CANDIDATES), key=lambda top: _squared_error(inputs, top))


def _squared_error(inputs: Tensor, top: float) -> float:
    low, high = activation_bounds(top)
    step = (high - low) / (ACTIVATION_LEVELS - 1)
    rounded = (inputs.clamp(low, high) / step).round() * step
    return (inputs - rounded).square().mean().item()


def fit_calibration(logits: Tensor, labels: Tensor) -> tuple[float, float]:
    """Temperature, 0.1 to 10, and smoothing, up to 0.2, of the lowest negative log-likelihood."""

    def loss(log_temperature: float, smoothing: float) -> float:
        return F.nll_loss(calibrated_softmax(logits, exp(log_temperature), smoothing).log(), labels).item()

    found = [(_lowest(partial(loss, smoothing=s), log(0.1), log(10.0)), s) for s in SMOOTHINGS]
    log_temperature, smoothing = min(found, key=lambda pair: loss(*pair))
    return exp(log_temperature), smoothing


def _lowest(loss: Callable[[float], float], low: float, high: float) -> float:
    """Where a function with one valley between the two ends has its minimum, searched by thirds."""
    for _ in range(40):
        third = (high - low) / 3
        low, high = (low, high - third) if loss(low + third) < loss(high - third) else (low + third, high)
    return (low + high) / 2


def calibrate_on(run: Engine, holdout: Split) -> tuple[float, float]:
    """Temperature and smoothing that suit pictures as they are and as JPEG, since uploads are both."""
    recoded = augment.recode_all(holdout.images, CALIBRATION_QUALITY)
    answers = torch.cat([metrics.served(run, images) for images in (holdout.images, recoded)])
    return fit_calibration(answers.clamp_min(SMALLEST).log(), holdout.labels.repeat(2))


def recarded(weights: Weights, **changes: Any) -> Weights:
    """With these changes to the card."""
    weights = weights._replace(card=weights.card.model_copy(update=changes))
    return weights._replace(reference_probabilities=_exact(weights, weights.reference_images))


def uncalibrated(weights: Weights) -> Weights:
    """Answers as the network was trained to give them, before they were calibrated."""
    return recarded(weights, temperature=1.0, label_smoothing_correction=0.0)


@torch.inference_mode()
def _exact(weights: Weights, images: np.ndarray) -> np.ndarray:
    """Probabilities of the stored weights in float32 on the CPU."""
    network = load_network(weights)
    logits = network(torch.from_numpy(images).permute(0, 3, 1, 2))
    return calibrated_softmax(logits, weights.card.temperature, weights.card.label_smoothing_correction).numpy()
