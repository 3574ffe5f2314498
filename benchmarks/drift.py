"""`python -m benchmarks.drift --data DIR`: the drift of changed test images, as the service would report it.

Each kind of change is one window of images. Nothing is chosen by the result.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from app import engines
from app.inference.classifier import Classifier
from app.inference.pipeline import Prediction
from app.model import weights
from app.model.preprocessing import DecodedImage
from app.telemetry.drift import DriftMonitor
from app.telemetry.metrics import Metrics
from benchmarks.out_of_distribution import drawn_digits
from training import augment, data
from training.data import Split
from training.metrics import ENGINE_BATCH

FEATURES = ("brightness", "confidence", "ood_score", "class", "exit_stage")

Change = Callable[[Split], torch.Tensor]  # images uint8 [N, S, S, 3]

CHANGES: dict[str, Change] = {
    "as they are": lambda test: test.images,
    "JPEG, quality 80": lambda test: augment.lossy_roundtrip_batch(test.images, 80),
    "JPEG, quality 50": lambda test: augment.lossy_roundtrip_batch(test.images, 50),
    "20 % darker": lambda test: (test.images * 0.8).to(torch.uint8),
    "two classes of ten": lambda test: test.images[(test.labels == 3) | (test.labels == 5)],
    "half the classes twice as often": lambda test: torch.cat([test.images, test.images[test.labels < 5]]),
    "one in five a drawn digit": lambda test: _with_digits(test.images),
}


def _with_digits(images: torch.Tensor) -> torch.Tensor:
    digits = torch.from_numpy(drawn_digits(np.random.default_rng(0)))
    return torch.cat([images[: 4 * len(digits)], digits])


def predictions(classifier: Classifier, images: torch.Tensor) -> list[Prediction]:
    decoded = [DecodedImage(each, None) for each in images.numpy()]
    return [Prediction(*scores, resized_from=None) for scores in classifier(decoded)]


def indices(classifier: Classifier, images: list[Prediction]) -> dict[str, tuple[float, float]]:
    """The index of each feature and its critical value after one window of these images."""
    metrics = Metrics()
    monitor = DriftMonitor(metrics, window=len(images))
    version, card = classifier.weights.version, classifier.weights.card
    monitor.start(version, card)
    monitor.observe(version, images)

    def value(name: str, feature: str) -> float:
        return metrics.registry.get_sample_value(f"thirtytwo_drift_{name}", {"feature": feature}) or 0.0

    return {feature: (value("psi", feature), value("psi_critical", feature)) for feature in FEATURES}


def _cell(index: float, critical: float) -> str:
    """Bold if the alert's condition holds."""
    return f"**{index:.2f}**" if index > max(0.2, critical) else f"{index:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="folder of CIFAR-10")
    parser.add_argument("--weights", type=Path, default=weights.BUNDLED, metavar="FILE")
    arguments = parser.parse_args()
    loaded = weights.load(arguments.weights)
    classifier = Classifier(loaded, engines.load(loaded), [ENGINE_BATCH])
    test = data.load(arguments.data, loaded.card.input_size, ["test"]).test
    print(f"| images | {' | '.join(FEATURES)} |\n| --- |{' ---: |' * len(FEATURES)}")
    for name, change in CHANGES.items():
        found = indices(classifier, predictions(classifier, change(test).contiguous()))
        print(f"| {name} | {' | '.join(_cell(*each) for each in found.values())} |", flush=True)


if __name__ == "__main__":
    main()
