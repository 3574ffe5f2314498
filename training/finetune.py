"""From frozen filters and a linear head to a weights file: one network, or a cascade of image and flip."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from app import engines
from app.engines.pytorch import load_network
from app.model.card import ModelCard, Stage
from app.model.networks import ConvNet
from app.model.weights import Weights, cascade_state
from training import calibration, metrics
from training.baseline import with_histograms
from training.cascade import reference_outputs
from training.data import Dataset, Split
from training.exits import choose_thresholds, probabilities_of, reaching
from training.export import RANGE_IMAGES, model_card, reference_images, split_results
from training.features import network_features
from training.linear_head import LinearHead
from training.ood import with_ood
from training.recipe import Recipe
from training.selection import Validation

MIN_EXIT = 0.9  # lowest confidence with which an image leaves before its flip: few images estimate no lower one


def compose(
    name: str,
    dataset: Dataset,
    recipe: Recipe,
    backbone: Weights,
    head: LinearHead,
    held_out: Validation,
    device: str = "auto",
) -> Weights:
    """The calibrated weights, without test results. Calibration is fitted to out-of-fold predictions."""
    train = dataset.train.select(held_out.head_images())
    network = _network(name, dataset, recipe, backbone, head, train)
    weights = torch.from_numpy(_image_weights(head))
    labels = torch.from_numpy(head.labels)
    temperatures = [
        calibration.fit_calibration(torch.from_numpy(each), labels, [0.0], weights)[0] for each in head.magnified
    ]
    results = {
        key.replace("val_", "cross_validated_"): value
        for key, value in split_results("val", _out_of_fold(head, temperatures), labels).items()
    }
    if not head.hflip:
        network = calibration.with_card(network, temperature=temperatures[0], results=results)
    scored = _with_ood(network, head, dataset.train, held_out.mask, device)
    if head.hflip:
        return _with_flip(scored, head, temperatures, results, train)
    return with_histograms(scored, train, _out_of_fold(head, temperatures).numpy())


def cross_validated(head: LinearHead, card: ModelCard) -> torch.Tensor:
    """Out-of-fold probabilities float32 [N, classes] of the views that are served, as the card calibrates them."""
    return _out_of_fold(head, [stage.temperature for stage in card.stages] or [card.temperature])


def _out_of_fold(head: LinearHead, temperatures: list[float]) -> torch.Tensor:
    temperature = temperatures[1 if head.hflip else 0]
    return torch.from_numpy(head.log_probabilities() / np.float32(temperature)).softmax(1)


def evaluate(weights: Weights, name: str, split: Split, device: str = "auto") -> tuple[Weights, torch.Tensor]:
    """The weights with results of the split `val` or `test` on the card, and probabilities float32 [N, classes].

    They are of the engine that serves.
    """
    probabilities = metrics.predict(engines.load(weights, device), split.images)
    changes: dict[str, Any] = {"results": weights.card.results | split_results(name, probabilities, split.labels)}
    if name == "test":
        changes["test_accuracy"] = round(metrics.accuracy(probabilities, split.labels), 6)
    return weights._replace(card=weights.card.model_copy(update=changes)), probabilities


def _image_weights(head: LinearHead) -> NDArray[np.float32]:
    """Weights [N] of the images in the likelihood that the temperature maximises, as in the head's fit."""
    return _class_weights(head)[head.labels]


def _class_weights(head: LinearHead) -> NDArray[np.float32]:
    """Weight [classes] of an image of each class, as in the head's fit."""
    counts = np.bincount(head.labels, minlength=len(head.weight))
    weights = len(head.labels) / (np.count_nonzero(counts) * counts.clip(min=1))
    return (weights if head.balanced else np.ones_like(weights)).astype(np.float32)


def _network(name: str, dataset: Dataset, recipe: Recipe, backbone: Weights, head: LinearHead, train: Split) -> Weights:
    """The backbone's tensors with the new head; raises SettingsError for an invalid name or class."""
    classes, width = head.weight.shape
    state = dict(backbone.state)
    state["head.weight"] = _stored(head.weight)
    card = model_card(
        name=name,
        classes=dataset.classes,
        input_size=backbone.card.input_size,
        architecture="convnet",
        arguments=backbone.card.arguments | {"classes": classes},
        parameters=backbone.card.parameters + (classes - len(backbone.card.classes)) * width,
        forward_gflops=backbone.card.forward_gflops,
        temperature=1.0,
        test_accuracy=None,
        dataset=dataset.name,
        recipe=recipe.model_dump(mode="json") | dataset.test_part(),
    )
    weights = Weights(card, state, reference_images(train), np.empty(0, np.float32), "")
    return calibration.with_card(weights, activation_ranges=_ranges(weights, backbone, train))


def _stored(weight: NDArray[np.float32]) -> NDArray[np.float16]:
    stored: NDArray[np.float16] = (weight * weight.shape[1]).astype(np.float16)  # ConvNet divides logits by the width
    return stored


def _with_ood(weights: Weights, head: LinearHead, images: Split, mask: torch.Tensor, device: str) -> Weights:
    """The weights with an out-of-distribution score, whose quantiles are of the validation images `mask` bool [N].

    Neither the statistics nor the head of the quantiles were fitted to these: a head is too confident of images that
    it was fitted to.
    """
    start = weights._replace(state={**weights.state, "head.weight": _stored(head.start_weight)})
    scored = with_ood(calibration.with_card(start), images.select(~mask), images.select(mask), device)
    card = weights.card.model_copy(update={"ood": scored.card.ood})
    return weights._replace(card=card, state={**scored.state, "head.weight": weights.state["head.weight"]})


def _ranges(weights: Weights, backbone: Weights, train: Split) -> dict[str, float]:
    """The larger of the backbone's and the new images' int8 ranges: few images reach few of the activations."""
    images = train.sample(RANGE_IMAGES).images
    found = calibration.calibrate_activation_ranges(load_network(weights), images)
    return {name: max(value, backbone.card.activation_ranges.get(name, 0.0)) for name, value in found.items()}


def _with_flip(
    network: Weights, head: LinearHead, temperatures: list[float], results: dict[str, Any], train: Split
) -> Weights:
    """A cascade whose second stage is the mean of image and flip, which is what the head was fitted to."""
    stages = [
        Stage(network=0, temperature=temperatures[0]),
        Stage(network=0, hflip=True, average_last=2, temperature=temperatures[1]),
    ]
    cost = network.card.forward_gflops or 0.0
    fitted = choose_thresholds(stages, head.magnified, [cost, cost])
    first = fitted[0].model_copy(update={"threshold": max(MIN_EXIT, fitted[0].threshold or 0.0)})
    fitted = [first, fitted[1]]
    outputs = np.stack([head.single, head.mean])
    reached = reaching(fitted, outputs)
    shares = [round(float(share), 4) for share in reached.mean(1)]
    fitted = [stage.model_copy(update={"share": share}) for stage, share in zip(fitted, shares, strict=True)]
    reference_stages = reference_outputs([network], fitted, network.reference_images)
    card = network.card.model_copy(
        update={
            "architecture": "cascade",
            "arguments": {},
            "activation_ranges": {},
            "forward_gflops": float(f"{cost * sum(shares):.4g}") or None,
            "networks": [network.card],
            "stages": fitted,
            "results": results,
        }
    )
    state = cascade_state([network])
    weights = Weights(card, state, network.reference_images, reference_stages[-1], "", reference_stages)
    single, mean = (probabilities_of(*each) for each in zip(fitted, outputs, strict=True))
    return with_histograms(weights, train, np.where(reached[1][:, None], mean, single))


def start_logits(backbone: Weights, head: LinearHead, images: torch.Tensor) -> torch.Tensor:
    """Logits float32 [N, classes] of the head that was fitted without the validation images, as it is served."""
    network = load_network(backbone)
    assert isinstance(network, ConvNet)
    views = (images, images.flip(2)) if head.hflip else (images,)
    features = np.mean([network_features(network, view) for view in views], axis=0)
    return torch.from_numpy(features @ head.start_weight.T)


def wins(logits: torch.Tensor, head_logits: torch.Tensor, val: Split, head: LinearHead) -> tuple[bool, str]:
    """Whether a fine-tuned network's accuracy on `val` exceeds the head's by more than a standard error, and why.

    `logits` float32 [V, classes] are of the network, `head_logits` of `start_logits`: both were fitted to the same
    images. Classes have the weights of the head's fit.
    """
    own, other = ((scores.argmax(1) == val.labels).double() for scores in (logits, head_logits))
    weights = torch.from_numpy(_class_weights(head)).double()[val.labels]
    difference = (own - other) * weights / weights.mean()
    error = float(difference.std(correction=0)) / len(val) ** 0.5
    means = [float((each * weights).sum() / weights.sum()) for each in (own, other)]
    score = f"validation accuracy {means[0]:.1%} against {means[1]:.1%} of a head, {len(val)} images"
    return float(difference.mean()) > error, score
