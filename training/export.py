"""From a trained network to a weights file: fold, quantise, calibrate, evaluate as served, save."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from app import engines
from app.engines.pytorch import load_network
from app.errors import SettingsError, WeightsError
from app.model import networks
from app.model.card import ModelCard
from app.model.quantization import quantize_weights
from app.model.weights import SCALE, Tensors, Weights, save
from training import calibration, metrics, provenance
from training.baseline import with_histograms
from training.data import Dataset, Split
from training.ood import with_ood
from training.recipe import Recipe

RANGE_IMAGES = 512  # validation images for the int8 ranges; more change them by less than their grid of candidates
REFERENCE_IMAGES = 8  # of different classes; the service checks its engine with them at start-up


def quantized_state(network: nn.Module) -> Tensors:
    """The state dict as stored: int8 with scales for a ConvNet's groups, float16 for the rest.

    Raises WeightsError for weights beyond float16.
    """
    # float16 for the rest: whitening, biases and head are small, and 11 bits of mantissa are exact enough.
    folded = networks.fold_batchnorms(network).cpu()
    state: Tensors = {name: value.half().numpy() for name, value in folded.state_dict().items()}
    for name, convolution in calibration.quantized_convolutions(folded):
        weight = f"{name}.weight"
        state[weight], state[weight + SCALE] = quantize_weights(convolution.weight.detach().float().numpy())
    if not all(np.isfinite(value).all() for value in state.values()):
        raise WeightsError("The folded weights exceed half precision: a batch norm has seen almost constant inputs.")
    return state


def build_card(name: str, dataset: Dataset, recipe: Recipe, network: nn.Module) -> ModelCard:
    """The card before training, without results; raises SettingsError for an invalid name or class."""
    return model_card(
        name=name,
        classes=dataset.classes,
        input_size=recipe.image_size,
        architecture=recipe.arch,
        arguments=recipe.network_arguments(len(dataset.classes)),
        parameters=sum(p.numel() for p in network.parameters()),
        forward_gflops=_forward_gflops(network, recipe.image_size),
        temperature=1,  # until `export` fits it
        test_accuracy=None,
        dataset=dataset.name,
        recipe=recipe.model_dump(mode="json") | dataset.test_part(),
    )


def model_card(**fields: Any) -> ModelCard:
    """The card with these fields; raises SettingsError, in one line, for a value or a combination that is invalid."""
    try:
        return ModelCard(**fields)
    except ValidationError as error:
        first = error.errors()[0]
        message = first["msg"].removeprefix("Value error, ").lower()
        where = f"{first['loc'][0]} {first['input']!r}" if first["loc"] else "model card"  # of all fields together
        raise SettingsError(f"Invalid {where}: {message}.") from error


def export(
    path: Path,
    card: ModelCard,
    test: Split,
    val: Split,
    network: nn.Module,
    training_s: float,
    device: str = "auto",
    train: Split | None = None,
) -> tuple[Weights, Tensor]:
    """Writes the weights file, calibrated and evaluated on the engine that serves on the device; raises OSError.

    The card's results name that engine, since calibration and accuracy differ between precisions. With training images
    the file gets an out-of-distribution score. Returns the file's contents, and its probabilities float32 [N, classes]
    for the test images, or without any for the validation images. Test images are read once, after everything is
    chosen.
    """
    results = provenance.step(training_s, next(network.parameters()).device)
    references = reference_images(val)  # never test images: the file is public
    weights = Weights(card, quantized_state(network), references, np.empty(0, np.float32), "")
    # The ranges are those of the stored weights, so that weight rounding is part of the error they minimise.
    ranges = calibration.calibrate_activation_ranges(load_network(weights), val.sample(RANGE_IMAGES).images)
    weights = calibration.with_card(weights, activation_ranges=ranges, results=results)
    # Temperature and correction are fitted on the engine that serves: int8 changes confidence, too.
    temperature, correction = calibration.calibrate_probabilities(engines.load(weights, device), val)
    weights = calibration.with_card(weights, temperature=temperature, label_smoothing_correction=correction)
    if train is not None:
        weights = with_ood(weights, train, val, device)
    engine = engines.load(weights, device)
    results["engine"] = provenance.engine(engine)
    probabilities = metrics.predict(engine, val.images)
    card = with_histograms(weights, val, probabilities.numpy()).card
    results.update(split_results("val", probabilities, val.labels))
    if len(test):
        probabilities = metrics.predict(engine, test.images)
        results.update(split_results("test", probabilities, test.labels))
        card = card.model_copy(update={"test_accuracy": round(metrics.accuracy(probabilities, test.labels), 6)})
    save(path, card, weights.state, references, weights.reference_probabilities)
    return weights._replace(card=card), probabilities


@torch.no_grad()
def _forward_gflops(network: nn.Module, size: int) -> float:
    """Billions of operations for one image, to four digits; a multiply-add counts as two."""
    image = torch.zeros(1, 3, size, size, dtype=torch.uint8)
    with FlopCounterMode(display=False) as counter:  # of the folded network, as served
        networks.fold_batchnorms(network).cpu()(image)
    return float(f"{counter.get_total_flops() / 1e9:.4g}")


def split_results(split: str, probabilities: Tensor, labels: Tensor) -> dict[str, Any]:
    """Metrics for the card; the keys begin with the name of the split."""
    result = metrics.evaluate(split, probabilities, labels)
    return {
        f"{split}_images": len(labels),
        f"{split}_accuracy": round(result.accuracy, 4),
        f"{split}_accuracy_interval": [round(bound, 4) for bound in result.interval_95],
        f"{split}_calibration_error": round(result.calibration_error, 4),
    }


def reference_images(val: Split) -> np.ndarray:
    """The first validation image of each of the first classes, uint8 [R, S, S, 3]."""
    firsts = [int((val.labels == label).nonzero()[0]) for label in val.labels.unique()[:REFERENCE_IMAGES]]
    return val.images[firsts].numpy()
