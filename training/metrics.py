"""Predictions for many images, and metrics of them: accuracy, calibration, test-time augmentation, lossy formats."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.stats import binomtest
from sklearn.calibration import calibration_curve
from sklearn.metrics import classification_report, confusion_matrix
from torch import Tensor, nn

from app.engines import Engine
from app.engines.cascade import PROBABILITY_FLOOR
from training import augment
from training.data import Split
from training.precision import Precision

PredictFn = Callable[[Tensor], Tensor]  # images uint8 [N, S, S, 3] to probabilities float32 [N, classes]

ENGINE_BATCH = 64  # the service's MAX_BATCH: int8 results do not depend on it, but bfloat16 ones may
LOSSY_FORMATS = (("JPEG", 80), ("JPEG", 50), ("WEBP", 80))  # frequent in uploads, at frequent quality settings
BINS = 15  # of the calibration error, as in Guo et al. 2017


class EvalResult(NamedTuple):
    """Shares of 1: accuracy, its 95 % Wilson interval, and the expected calibration error."""

    name: str
    accuracy: float
    interval_95: tuple[float, float]
    calibration_error: float


@torch.inference_mode()
def predict_logits(network: nn.Module, images: Tensor) -> Tensor:
    """Logits float32 [N, classes] on the CPU, of a network in training, for images uint8 [N, H, W, 3]."""
    network.eval()  # running statistics in batch norms; the trainer sets training mode again each epoch
    device = next(network.parameters()).device
    precision, parts = Precision.of(device), []
    for part in images.split(1000):  # bounds the memory of the activations
        with precision.autocast():
            # [n, H, W, 3] to [n, 3, H, W] without a copy: channels last in memory.
            parts.append(network(part.to(device).permute(0, 3, 1, 2)).float().cpu())
    return torch.cat(parts)


def predict(engine: Engine, images: Tensor) -> Tensor:
    """Probabilities float32 [N, classes] of an engine for images uint8 [N, S, S, 3], in the service's batches."""
    parts = (np.ascontiguousarray(part.cpu().numpy()) for part in images.split(ENGINE_BATCH))
    return torch.cat([torch.from_numpy(engine(part).probabilities) for part in parts])


def accuracy(scores: Tensor, labels: Tensor) -> float:
    """Share of rows of [N, classes] whose largest entry is the label."""
    return (scores.argmax(1) == labels).float().mean().item()


def wilson_interval(correct: int, count: int) -> tuple[float, float]:
    """95 % score interval of the share `correct / count` (Wilson 1927)."""
    low, high = binomtest(correct, count).proportion_ci(0.95, "wilson")
    return float(low), float(high)


def reliability(probabilities: Tensor, labels: Tensor) -> dict[str, list[float]]:
    """Bins of the top probability that are not empty: mean `confidence`, `accuracy` and `count` (Guo et al. 2017)."""
    confidence, predicted = (values.numpy() for values in probabilities.max(1))
    confidence = confidence.astype(np.float64)  # float32 means of 10,000 values lose digits of the error
    accuracies, confidences = calibration_curve(predicted == labels.numpy(), confidence, n_bins=BINS, pos_label=True)
    # The bins of calibration_curve, which returns no counts: equal widths, closed above.
    edges = np.linspace(0, 1, BINS + 1)
    counts = np.bincount(np.searchsorted(edges[1:-1], confidence), minlength=BINS)
    return {
        "confidence": confidences.tolist(),
        "accuracy": accuracies.tolist(),
        "count": counts[counts > 0].tolist(),
    }


def calibration_error(probabilities: Tensor, labels: Tensor) -> float:
    """Expected calibration error: mean gap of confidence and accuracy, weighted by bin size (Guo et al. 2017)."""
    bins = reliability(probabilities, labels)
    gaps = np.abs(np.subtract(bins["confidence"], bins["accuracy"]))
    return float(np.average(gaps, weights=bins["count"]))


def evaluate(name: str, probabilities: Tensor, labels: Tensor) -> EvalResult:
    """Metrics of probabilities float32 [N, classes] for labels int64 [N]."""
    share = accuracy(probabilities, labels)
    interval = wilson_interval(round(share * len(labels)), len(labels))
    return EvalResult(name, share, interval, calibration_error(probabilities, labels))


def classification_metrics(probabilities: Tensor, labels: Tensor, classes: list[str]) -> dict[str, Any]:
    """`evaluate`, precision, recall and F1 per class and their mean, confusion matrix and reliability, as JSON.

    Means are over the classes that have images; `balanced_accuracy` is that of recall. `majority_baseline` is the
    accuracy of always predicting the most frequent class, `never_predicted` lists classes.
    """
    result, predicted, indices = evaluate("", probabilities, labels), probabilities.argmax(1), range(len(classes))
    per_class = classification_report(labels, predicted, labels=indices, output_dict=True, zero_division=0)
    present = [per_class[str(i)] for i in indices if per_class[str(i)]["support"]]
    means = {name: float(np.mean([row[name] for row in present])) for name in ("precision", "recall", "f1-score")}
    return {
        "images": len(labels),
        "accuracy": result.accuracy,
        "balanced_accuracy": means["recall"],
        "macro_f1": means["f1-score"],
        "majority_baseline": max(row["support"] for row in present) / len(labels),
        "never_predicted": [name for i, name in enumerate(classes) if not (predicted == i).any()],
        "interval_95": result.interval_95,
        "calibration_error": result.calibration_error,
        "macro_average": means | {"support": float(len(labels))},
        "per_class": {name: per_class[str(i)] for i, name in enumerate(classes)},
        "confusion": confusion_matrix(labels, predicted, labels=indices).tolist(),
        "reliability": reliability(probabilities, labels),
    }


# Test-time augmentation as in `infer` of Jordan 2024 (arXiv 2404.00498). Averaged log-probabilities rank and score the
# classes as averaged logits do: per view they differ by one number for all classes.


def log_probs(predict: PredictFn, images: Tensor) -> Tensor:
    """Log-probabilities float32 [N, classes] of one view."""
    return predict(images).clamp(min=float(PROBABILITY_FLOOR)).log()


def flip_tta(predict: PredictFn, images: Tensor) -> Tensor:
    """Mean log-probabilities [N, classes] of image and horizontal flip."""
    return (log_probs(predict, images) + log_probs(predict, images.flip(2))) / 2


def flip_translate_tta(predict: PredictFn, images: Tensor) -> Tensor:
    """Mean log-probabilities [N, classes] of six views: half `flip_tta`, half `flip_tta` of two one-pixel shifts."""
    padded, size = augment.pad(images, 1), images.shape[1]  # reflected, as in training's random crops
    shifted = [padded[:, i : i + size, i : i + size] for i in (2, 0)]  # up and left, down and right
    shifted_mean = (flip_tta(predict, shifted[0]) + flip_tta(predict, shifted[1])) / 2
    return (flip_tta(predict, images) + shifted_mean) / 2


def evaluate_tta(predict: PredictFn, split: Split) -> list[EvalResult]:
    """What test-time augmentation of every image would reach, at two and six times the cost."""
    # softmax normalises the mean log-probabilities again.
    return [
        evaluate("flip TTA (2 views)", flip_tta(predict, split.images).softmax(1), split.labels),
        evaluate(
            "flip and translate TTA (6 views)", flip_translate_tta(predict, split.images).softmax(1), split.labels
        ),
    ]


def evaluate_lossy_formats(predict: PredictFn, split: Split) -> list[EvalResult]:
    """Robustness to lossy formats."""
    return [
        evaluate(
            f"{image_format} quality {quality}",
            predict(augment.lossy_roundtrip_batch(split.images, quality, image_format)),
            split.labels,
        )
        for image_format, quality in LOSSY_FORMATS
    ]


def table(results: Sequence[EvalResult]) -> str:
    """Markdown; differences are to the first result."""
    lines = [
        "| evaluation | accuracy | 95 % interval | difference | calibration error |",
        "| --- | ---: | --- | ---: | ---: |",
    ]
    for result in results:
        low, high = result.interval_95
        difference = 100 * (result.accuracy - results[0].accuracy)
        lines.append(
            f"| {result.name} | {result.accuracy:.2%} | {low:.2%} to {high:.2%} | {difference:+.2f} points "
            f"| {result.calibration_error:.2%} |"
        )
    return "\n".join(lines)
