"""Post-training calibration on validation images: int8 ranges, temperature and label-smoothing correction."""

import logging
from collections.abc import Callable, Iterator, Sequence
from math import exp, log
from typing import Any

import numpy as np
import torch
from scipy.optimize import minimize_scalar
from torch import Tensor, nn
from torch.nn import functional as F

from app.engines import Engine
from app.engines.pytorch import calibrated_softmax, load_network
from app.model.networks import ConvNet
from app.model.quantization import ACTIVATION_LEVELS, GELU_MIN, activation_bounds
from app.model.weights import Weights
from training import augment, metrics
from training.data import Split

CLIPPING_CANDIDATES = [0.95**i for i in range(45)]  # of the largest input: 1 down to 0.1
SAMPLE_STRIDE = 13  # samples one input of 13; a prime, so that no layer's width or height is a multiple of it
JPEG_QUALITY = 80  # a common default of image editors
PROBABILITY_FLOOR = 1e-30  # before the logarithm
TEMPERATURE_BOUNDS = (0.1, 10.0)
PRIOR_DEVIATION = 0.5  # of the logarithm of the temperature: halving and doubling are 1.4 deviations
PRIOR_CORRECTION = 0.05  # mean of the correction's prior; 10 images outweigh it
SMOOTHING_GRID = [step / 100 for step in range(21)]  # label-smoothing corrections from 0 to 0.2

logger = logging.getLogger(__name__)


def quantized_convolutions(network: nn.Module) -> Iterator[tuple[str, nn.Conv2d]]:
    """Name and module of each convolution that is stored and served in int8: those of a ConvNet's groups.

    The whitening and the head stay in higher precision: they are cheap, and their inputs and outputs are sensitive.
    """
    if isinstance(network, ConvNet):
        for name, module in network.groups.named_modules(prefix="groups"):
            if isinstance(module, nn.Conv2d):
                yield name, module


@torch.inference_mode()
def calibrate_activation_ranges(network: nn.Module, images: Tensor) -> dict[str, float]:
    """The largest int8 input of each quantised convolution, from its inputs for images uint8 [N, S, S, 3]."""
    # Hooks on the inputs, because GELU and pooling before a convolution are functions without a module.
    samples = {name: list[Tensor]() for name, _ in quantized_convolutions(network)}

    def record(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _, inputs: samples[name].append(inputs[0].flatten()[::SAMPLE_STRIDE].clone())

    hooks = [module.register_forward_pre_hook(record(name)) for name, module in quantized_convolutions(network)]
    for part in images.split(metrics.ENGINE_BATCH):  # bounds the memory of the activations
        network(part.permute(0, 3, 1, 2))
    for hook in hooks:
        hook.remove()
    # One range per tensor: an int8 convolution has a single input scale.
    return {name: mse_clipping_range(torch.cat(parts)) for name, parts in samples.items()}


def mse_clipping_range(inputs: Tensor) -> float:
    """The maximum of the int8 range with the least squared error, clipping and rounding together, for float32 [N].

    Clipping the few largest inputs makes the steps finer for all others (Choukroun et al. 2019, arXiv 1902.06822).
    """
    largest = max(inputs.max().item(), -GELU_MIN)  # above 0, even where all units of the layer before are dead
    return min((share * largest for share in CLIPPING_CANDIDATES), key=lambda top: _squared_error(inputs, top))


def _squared_error(inputs: Tensor, maximum: float) -> float:
    low, high = activation_bounds(maximum)
    step = (high - low) / (ACTIVATION_LEVELS - 1)
    # Rounds to the grid and back, as FakeQuantize does in the engine.
    quantized = (inputs.clamp(low, high) / step).round() * step
    return (inputs - quantized).square().mean().item()


def as_jpeg(images: Tensor) -> Tensor:
    """Images uint8 [N, S, S, 3] after the default quality of image editors."""
    return augment.lossy_roundtrip_batch(images, JPEG_QUALITY)


def calibrate_probabilities(engine: Engine, val: Split) -> tuple[float, float]:
    """(temperature, label-smoothing correction) fitted to validation images as they are and as JPEG, as uploads are."""
    # One temperature serves both kinds of upload, so the fit sees both, with equal weight.
    lossy = as_jpeg(val.images)
    probabilities = torch.cat([metrics.predict(engine, images) for images in (val.images, lossy)])
    # The engine returns probabilities only; their logarithms are logits up to an offset, which softmax ignores.
    return fit_calibration(probabilities.clamp_min(PROBABILITY_FLOOR).log(), val.labels.repeat(2))


def fit_calibration(
    logits: Tensor, labels: Tensor, corrections: Sequence[float] = SMOOTHING_GRID, weights: Tensor | None = None
) -> tuple[float, float]:
    """(temperature from 0.1 to 10, correction out of `corrections`) with the least penalised negative log-likelihood.

    The penalty is the negative logarithm of a prior towards no change: log T is normal around 0, the correction is
    exponential. Without errors the likelihood alone has no maximum. `weights` float32 [N] are of the images; mean 1.
    """
    images = len(labels) if weights is None else float(weights.sum())

    def loss(log_temperature: float, correction: float) -> float:
        penalty = (log_temperature / PRIOR_DEVIATION) ** 2 / 2 + correction / PRIOR_CORRECTION
        losses = F.nll_loss(
            calibrated_softmax(logits, exp(log_temperature), correction).log(), labels, reduction="none"
        )
        return float((losses if weights is None else losses * weights).sum() + penalty) / images

    # The search is in logarithms: halving and doubling are equal steps.
    bounds = log(TEMPERATURE_BOUNDS[0]), log(TEMPERATURE_BOUNDS[1])
    # The correction is a grid, because the loss is not smooth in it where the floor of the correction starts.
    fits = [minimize_scalar(loss, args=(c,), bounds=bounds, options={"xatol": 1e-3}) for c in corrections]
    best = min(range(len(fits)), key=lambda i: float(fits[i].fun))
    temperature = exp(fits[best].x)
    if not TEMPERATURE_BOUNDS[0] * 1.01 < temperature < TEMPERATURE_BOUNDS[1] * 0.99:
        logger.warning("The temperature %.3g is at its bound: confidence is not calibrated.", temperature)
    if len(corrections) > 1 and corrections[best] == max(corrections):
        logger.warning("The label-smoothing correction %.2g is at its bound.", corrections[best])
    return temperature, corrections[best]


def with_card(weights: Weights, **changes: Any) -> Weights:
    """The weights with these changes to the card, and the reference probabilities that follow from them."""
    weights = weights._replace(card=weights.card.model_copy(update=changes))
    return weights._replace(reference_probabilities=reference_outputs(weights))


def uncalibrated(weights: Weights) -> Weights:
    """The weights with the plain softmax that the network was trained with."""
    return with_card(weights, temperature=1.0, label_smoothing_correction=0.0)


@torch.inference_mode()
def reference_outputs(weights: Weights) -> np.ndarray:
    """Probabilities float32 [R, classes] of the stored weights for the reference images, in float32 on the CPU."""
    network = load_network(weights)  # exact: no engine's rounding belongs into the reference
    logits = network(torch.from_numpy(weights.reference_images).permute(0, 3, 1, 2))
    return calibrated_softmax(logits, weights.card.temperature, weights.card.label_smoothing_correction).numpy()
