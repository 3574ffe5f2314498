"""Answers to many images, what they say of a network, and further looks at the same images."""

from collections.abc import Callable, Sequence
from math import sqrt
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from app.engines import Engine
from app.model import tta
from training import augment
from training.data import Split

Answer = Callable[[Tensor], Tensor]  # images uint8 [N, S, S, 3] to probabilities float32 [N, classes]

SERVED_BATCH = 64
FORMATS = (("JPEG", 80), ("JPEG", 50), ("WEBP", 80))  # what uploads often are, with the qualities programs often take


@torch.inference_mode()
def logits(network: nn.Module, images: Tensor) -> Tensor:
    """float32 [N, classes] on the CPU for uint8 images [N, H, W, 3], one view an image."""
    network.eval()
    device = next(network.parameters()).device
    parts = []
    for part in images.split(1000):
        with torch.autocast(device.type, torch.bfloat16):
            parts.append(network(part.to(device).permute(0, 3, 1, 2)).float().cpu())
    return torch.cat(parts)


def served(run: Engine, images: Tensor) -> Tensor:
    """Probabilities float32 [N, classes] from an engine, one view an image, in batches as a service makes them."""
    parts = (np.ascontiguousarray(part.numpy()) for part in images.split(SERVED_BATCH))
    return torch.cat([torch.from_numpy(run(part).probabilities) for part in parts])


def accuracy(scores: Tensor, labels: Tensor) -> float:
    """Share of rows of [N, classes] whose largest entry is the label."""
    return (scores.argmax(1) == labels).float().mean().item()


def wilson(share: float, count: int, z: float = 1.96) -> tuple[float, float]:
    """95 % score interval of a share measured on `count` trials (Wilson 1927)."""
    centre = share + z * z / (2 * count)
    spread = z * sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    scale = 1 + z * z / count
    return (centre - spread) / scale, (centre + spread) / scale


def confusion(scores: Tensor, labels: Tensor) -> Tensor:
    """int64 [classes, classes]: row is the true class, column the predicted one."""
    classes = scores.shape[1]
    return torch.bincount(labels * classes + scores.argmax(1), minlength=classes**2).view(classes, classes)


def reliability(probabilities: Tensor, labels: Tensor, bins: int = 15) -> list[tuple[int, float, float]]:
    """(count, mean confidence, accuracy) of each equal-width bin of the top probability (Guo et al. 2017)."""
    confidence, predicted = probabilities.max(1)
    index = (confidence * bins).ceil().long().clamp(1, bins) - 1
    table = []
    for i in range(bins):
        inside = index == i
        count = int(inside.sum())
        hits = (predicted == labels)[inside].double().mean().item() if count else 0.0
        table.append((count, confidence[inside].double().mean().item() if count else 0.0, hits))
    return table


def calibration_error(probabilities: Tensor, labels: Tensor, bins: int = 15) -> float:
    """Expected calibration error: mean gap of confidence and accuracy, weighted by bin size (Guo et al. 2017)."""
    return sum(n * abs(conf - hit) for n, conf, hit in reliability(probabilities, labels, bins)) / len(labels)


def one(answer: Answer, images: Tensor) -> Tensor:
    """Log-probabilities [N, classes] of the images as they are; so do the next two."""
    return answer(images).clamp(min=tta.PROBABILITY_FLOOR).log()


def two(answer: Answer, images: Tensor) -> Tensor:
    """The mean of an image and its mirror image."""
    return (one(answer, images) + one(answer, images.flip(2))) / 2


def doubtful(answer: Answer, images: Tensor, first: Tensor) -> Tensor:
    """Probabilities [N, classes] as served for lossy formats: of two looks where `first` is in doubt."""
    probabilities = first.clone()
    again = torch.from_numpy(tta.is_uncertain(probabilities.numpy(), tta.DEFAULT_THRESHOLD))
    if again.any():
        second = answer(images[again].flip(2))
        probabilities[again] = torch.from_numpy(tta.geometric_mean(probabilities[again].numpy(), second.numpy()))
    return probabilities


def six(answer: Answer, images: Tensor) -> Tensor:
    """One half `two`, the other half `two` of the images moved up and left, and down and right, by a pixel."""
    padded, size = augment.pad(images, 1), images.shape[1]
    moved = [padded[:, i : i + size, i : i + size] for i in (2, 0)]
    return two(answer, images) / 2 + (two(answer, moved[0]) + two(answer, moved[1])) / 4


class Reading(NamedTuple):
    """Shares of 1; the interval is Wilson's of 95 %, the calibration error's bins are 15."""

    what: str
    accuracy: float
    interval_95: tuple[float, float]
    calibration_error: float


def take(what: str, probabilities: Tensor, labels: Tensor) -> Reading:
    share = accuracy(probabilities, labels)
    interval = wilson(share, len(labels))
    return Reading(what, share, interval, calibration_error(probabilities, labels))


def of_views(answer: Answer, split: Split) -> list[Reading]:
    """What averaging would bring, at two and six times the cost."""
    return [
        take("two views: and mirrored", two(answer, split.images).softmax(1), split.labels),
        take("six views: and moved by a pixel", six(answer, split.images).softmax(1), split.labels),
    ]


def of_formats(answer: Answer, split: Split) -> list[Reading]:
    """The pictures as they come back from lossy formats: one view, and a second look where the service takes one."""
    readings = []
    for kind, quality in FORMATS:
        recoded = augment.recode_all(split.images, quality, kind)
        first = answer(recoded)
        readings.append(take(f"{kind} of quality {quality}, one view", first, split.labels))
        served = doubtful(answer, recoded, first)
        readings.append(take(f"{kind} of quality {quality}, as served", served, split.labels))
    return readings


def table(readings: Sequence[Reading]) -> str:
    """Markdown; the first reading is the one that the others are compared with."""
    lines = [
        "| reading | accuracy | 95 % interval | against the first | calibration error |",
        "| --- | --- | --- | --- | --- |",
    ]
    for reading in readings:
        low, high = reading.interval_95
        gain = 100 * (reading.accuracy - readings[0].accuracy)
        lines.append(
            f"| {reading.what} | {reading.accuracy:.2%} | {low:.2%} to {high:.2%} | {gain:+.2f} points "
            f"| {reading.calibration_error:.2%} |"
        )
    return "\n".join(lines)
