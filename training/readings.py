"""Further looks at the same test images: averaged views, and the pictures after a lossy format."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from training import augment, metrics, views
from training.data import Split
from training.views import Answer

FORMATS = (("JPEG", 80), ("JPEG", 50), ("WEBP", 80))  # what uploads often are, with the qualities programs often take


class Reading(NamedTuple):
    """Shares of 1; the interval is Wilson's of 95 %, the calibration error's bins are 15."""

    what: str
    accuracy: float
    interval_95: tuple[float, float]
    calibration_error: float


def take(what: str, probabilities: Tensor, labels: Tensor) -> Reading:
    accuracy = metrics.accuracy(probabilities, labels)
    interval = metrics.wilson(accuracy, len(labels))
    return Reading(what, accuracy, interval, metrics.calibration_error(probabilities, labels))


def of_views(answer: Answer, split: Split) -> list[Reading]:
    """What averaging would bring, at two and six times the cost."""
    return [
        take("two views: and mirrored", views.two(answer, split.images).softmax(1), split.labels),
        take("six views: and moved by a pixel", views.six(answer, split.images).softmax(1), split.labels),
    ]


def of_formats(answer: Answer, split: Split) -> list[Reading]:
    """The pictures as they come back from lossy formats: one view, and a second look where the service takes one."""
    readings = []
    for kind, quality in FORMATS:
        recoded = augment.recode_all(split.images, quality, kind)
        first = answer(recoded)
        readings.append(take(f"{kind} of quality {quality}, one view", first, split.labels))
        served = views.doubtful(answer, recoded, first)
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
