"""A trained network as a weights file: rounded, calibrated, and measured as it will be served."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from app import engines
from app.engines.pytorch import load_network
from app.errors import SettingsError
from app.model import networks
from app.model.card import ModelCard
from app.model.quantization import quantize_weights
from app.model.weights import SCALE, Tensors, Weights, save
from benchmarks import throughput
from training import calibration, metrics
from training.data import DataSet, Split
from training.recipe import Recipe

RANGED = 512  # held-out pictures that the ranges of int8 are read from
SPEED_S = 0.25  # of measuring each batch size
REFERENCES = 8  # held-out pictures of as many classes, for the service to check itself by


def rounded(network: nn.Module) -> Tensors:
    """The state of the network as it is stored: a ConvNet's groups' filters in int8, the rest in half precision."""
    folded = networks.fold_batchnorms(network).cpu()
    state: Tensors = {name: value.half().numpy() for name, value in folded.state_dict().items()}
    for name, convolution in calibration.convolutions(folded):
        filters = f"{name}.weight"
        state[filters], state[filters + SCALE] = quantize_weights(convolution.weight.detach().float().numpy())
    return state


def describe(name: str, dataset: DataSet, recipe: Recipe, network: nn.Module) -> ModelCard:
    """The card as far as it is known before training; raises SettingsError for what no card can hold."""
    try:
        return ModelCard(
            name=name,
            classes=dataset.classes,
            input_size=recipe.image_size,
            architecture=recipe.arch,
            arguments=recipe.network_arguments(len(dataset.classes)),
            parameters=sum(p.numel() for p in network.parameters()),
            forward_gflops=_gflops(network, recipe.image_size),
            temperature=1,
            test_accuracy=None,
            dataset=dataset.name,
            recipe=asdict(recipe),
        )
    except ValidationError as error:
        first = error.errors()[0]
        field = first["loc"][0]
        raise SettingsError(f"The card's {field} cannot be {first['input']!r}: {first['msg']}.") from error


def write(
    path: Path, card: ModelCard, test: Split, holdout: Split, network: nn.Module, seconds: float
) -> tuple[Weights, Tensor]:
    """Calibrates on the held-out images, reads the test images once, if at all, and saves; raises OSError.

    Gives what was saved, and its probabilities for the test images, or for the held-out ones where there are none.
    """
    results: dict[str, Any] = {"training_s": round(seconds)}
    references = _references(holdout)
    weights = Weights(card, rounded(network), references, np.empty(0, np.float32), "")
    ranges = calibration.input_ranges(load_network(weights), holdout.images[:RANGED])
    weights = calibration.recarded(weights, activation_ranges=ranges, results=results)
    temperature, smoothing = calibration.calibrate_on(engines.load(weights), holdout)
    weights = calibration.recarded(weights, temperature=temperature, smoothing=smoothing)
    card, run = weights.card, engines.load(weights)
    answers = metrics.served(run, holdout.images)
    results.update(_results("holdout", answers, holdout.labels))
    if len(test):
        answers = metrics.served(run, test.images)
        results.update(_results("test", answers, test.labels))
        card = card.model_copy(update={"test_accuracy": round(metrics.accuracy(answers, test.labels), 6)})
    results["speed"] = throughput.figures(run, card.input_size, SPEED_S)
    save(path, card, weights.state, references, weights.reference_probabilities)
    return weights._replace(card=card), answers


@torch.no_grad()
def _gflops(network: nn.Module, size: int) -> float:
    """Billions of operations for one image, to four digits; a multiply-add counts as two."""
    image = torch.zeros(1, 3, size, size, dtype=torch.uint8)
    with FlopCounterMode(display=False) as counter:
        networks.fold_batchnorms(network).cpu()(image)
    return float(f"{counter.get_total_flops() / 1e9:.4g}")


def _results(split: str, answers: Tensor, labels: Tensor) -> dict[str, Any]:
    accuracy = metrics.accuracy(answers, labels)
    low, high = metrics.wilson(accuracy, len(labels))
    return {
        f"{split}_images": len(labels),
        f"{split}_accuracy": round(accuracy, 4),
        f"{split}_accuracy_interval": [round(low, 4), round(high, 4)],
        f"{split}_calibration_error": round(metrics.calibration_error(answers, labels), 4),
    }


def _references(holdout: Split) -> np.ndarray:
    """One held-out picture of each of the first classes."""
    firsts = [int((holdout.labels == label).nonzero()[0]) for label in holdout.labels.unique()[:REFERENCES]]
    return holdout.images[firsts].numpy()
