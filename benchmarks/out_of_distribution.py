"""Compares published out-of-distribution scores of a network on sets that are not its training data.

    python -m benchmarks.out_of_distribution --data folder-of-cifar-10 --sets FOLDER

Some sets are made here; FOLDER adds one per subfolder of images. Validation images are the other class of each area
under the ROC curve. All scores are of one forward pass in float32.
"""

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from scipy.special import logsumexp, softmax
from sklearn.datasets import load_digits, load_sample_images
from sklearn.metrics import roc_auc_score

from app.engines.pytorch import load_network
from app.model import weights
from app.model.networks import ConvNet
from app.model.weights import BUNDLED
from training import data
from training.ood import DISTANCE_WEIGHT, fit_statistics

SIZE = 32
COUNT = 1000
TRAINING_IMAGES = 8000
NEIGHBOURS = 50
VIM_DIMENSIONS = 64

Array = NDArray[np.float32]
Pixels = NDArray[np.uint8]


def noise(rng: np.random.Generator) -> Pixels:
    return rng.integers(0, 256, (COUNT, SIZE, SIZE, 3), dtype=np.uint8)


def blobs(rng: np.random.Generator) -> Pixels:
    """Blurred noise with the contrast of photographs."""

    def blob() -> Array:
        blurred = Image.fromarray(noise(rng)[0]).filter(ImageFilter.GaussianBlur(rng.uniform(1, 4)))
        pixels = np.asarray(blurred, np.float32)
        scaled: Array = (pixels - pixels.mean()) * rng.uniform(2, 8) + rng.uniform(80, 170)
        return scaled.clip(0, 255)

    return np.stack([blob() for _ in range(COUNT // 4)]).astype(np.uint8)


def drawn_digits(rng: np.random.Generator) -> Pixels:
    """One or two digits in a random colour on another, as on house numbers."""

    def digits() -> Pixels:
        ground, colour = (tuple(rng.integers(0, 256, 3).tolist()) for _ in range(2))
        image = Image.new("RGB", (64, 64), ground)
        font = ImageFont.load_default(int(rng.integers(30, 60)))
        position = int(rng.integers(5, 25)), int(rng.integers(-5, 10))
        ImageDraw.Draw(image).text(position, str(rng.integers(0, 100)), colour, font)
        return np.asarray(image.rotate(rng.uniform(-15, 15), fillcolor=ground).resize((SIZE, SIZE)))

    return np.stack([digits() for _ in range(COUNT)])


def handwritten_digits(rng: np.random.Generator) -> Pixels:
    del rng
    images = (load_digits().images[:COUNT] * 15.9).astype(np.uint8)
    return np.stack([_small(Image.fromarray(image)) for image in images])


def sample_photographs(rng: np.random.Generator) -> Pixels:
    """Random crops of a flower and a temple."""

    def crop(pixels: Pixels) -> Pixels:
        side = int(rng.integers(80, 400))
        top, left = (int(rng.integers(0, length - side)) for length in pixels.shape[:2])
        return _small(Image.fromarray(pixels[top : top + side, left : left + side]))

    return np.stack([crop(pixels) for pixels in load_sample_images().images for _ in range(COUNT // 4)])


SETS: dict[str, Callable[[np.random.Generator], Pixels]] = {
    "uniform noise": noise,
    "blobs": blobs,
    "drawn digits": drawn_digits,
    "handwritten digits": handwritten_digits,
    "flower and temple": sample_photographs,
}


def folders(root: Path) -> Iterator[tuple[str, Pixels]]:
    """Each subfolder as a set of its images, centre-cropped; transparency becomes white."""
    for folder in sorted(path for path in root.iterdir() if path.is_dir()):
        files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in {".png", ".jpg", ".webp"})[:COUNT]
        yield folder.name, np.stack([_small(_on_white(Image.open(file))) for file in files])


def _on_white(image: Image.Image) -> Image.Image:
    layer = image.convert("RGBA")
    ground = Image.new("RGBA", layer.size, "white")
    ground.alpha_composite(layer)
    return ground


def _small(image: Image.Image) -> Pixels:
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = image.convert("RGB").crop((left, top, left + side, top + side))
    return np.asarray(square.resize((SIZE, SIZE), Image.Resampling.BICUBIC, reducing_gap=3))


class Outputs:
    """Logits [N, classes], inputs of the head [N, C] and spatial means before the last group [N, D] of images."""

    def __init__(self, network: ConvNet, images: Pixels) -> None:
        inputs: list[torch.Tensor] = []
        hook = network.head.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0].float()))
        with torch.inference_mode():
            parts = [
                network.logits_and_means(torch.from_numpy(images[start : start + 64]).permute(0, 3, 1, 2))
                for start in range(0, len(images), 64)
            ]
        hook.remove()
        self.logits: Array = torch.cat([logits for logits, _ in parts]).numpy()
        self.means: Array = torch.cat([means for _, means in parts]).numpy()
        self.features: Array = torch.cat(inputs).numpy()


def scorers(network: ConvNet, train: Outputs, labels: NDArray[np.int64]) -> dict[str, Callable[[Outputs], Array]]:
    """Published scores, higher for images that resemble the training images less."""
    head = network.head.weight.detach().numpy() / network.head.in_features
    clip = np.quantile(train.features, 0.9)
    bank = _unit(train.features)
    variances, directions = np.linalg.eigh(train.features.T @ train.features / len(train.features))
    null = directions[:, : len(variances) - VIM_DIMENSIONS]
    alpha = train.logits.max(1).mean() / np.linalg.norm(train.features @ null, axis=1).mean()
    statistics = fit_statistics(train.means, labels, train.logits.shape[1])

    def energy(outputs: Outputs) -> Array:
        scores: Array = -logsumexp(outputs.logits, axis=1)
        return scores

    def mahalanobis(outputs: Outputs) -> Array:
        whitened = outputs.means @ statistics.whitening.T
        distances: Array = np.stack([((whitened - mean) ** 2).sum(1) for mean in statistics.means], 1)
        nearest: Array = distances.min(1)
        return nearest

    return {
        "top probability (2017)": lambda each: -softmax(each.logits, 1).max(1),
        "maximum logit (2022)": lambda each: -each.logits.max(1),
        "energy (2020)": energy,
        "ReAct (2021)": lambda each: -logsumexp(np.minimum(each.features, clip) @ head.T, axis=1),
        "nearest neighbours (2022)": lambda each: -np.sort(_unit(each.features) @ bank.T, 1)[:, -NEIGHBOURS],
        "ViM (2022)": lambda each: alpha * np.linalg.norm(each.features @ null, axis=1) + energy(each),
        "Mahalanobis, earlier groups (2018)": mahalanobis,
    }


def _unit(features: Array) -> Array:
    unit: Array = features / np.linalg.norm(features, axis=1, keepdims=True)
    return unit


def combined(first: dict[str, Array], second: dict[str, Array]) -> dict[str, Array]:
    """The sum of two scores in standard deviations of the validation images, the second with DISTANCE_WEIGHT."""
    deviations = first[""].std(), second[""].std()
    return {name: first[name] / deviations[0] + DISTANCE_WEIGHT * second[name] / deviations[1] for name in first}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.out_of_distribution", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--data", type=Path, required=True, help="folder of CIFAR-10")
    parser.add_argument("--weights", type=Path, default=BUNDLED, help="of a cascade the first network is measured")
    parser.add_argument("--sets", type=Path, help="folder with one subfolder of images per further set")
    arguments = parser.parse_args()
    loaded = weights.load(arguments.weights)
    single = (loaded.networks or [loaded])[0]
    network = load_network(single)
    assert isinstance(network, ConvNet)
    train, val = data.recorded_split(data.load(arguments.data, SIZE, ["train"]), single.card.recipe)
    sets = {name: make(np.random.default_rng(0)) for name, make in SETS.items()}
    sets |= dict(folders(arguments.sets)) if arguments.sets else {}
    outputs = {"": Outputs(network, val.images.numpy())} | {name: Outputs(network, each) for name, each in sets.items()}
    reference = Outputs(network, train.images[:TRAINING_IMAGES].numpy())
    functions = scorers(network, reference, train.labels[:TRAINING_IMAGES].numpy())
    scores = {name: {of: score(each) for of, each in outputs.items()} for name, score in functions.items()}
    first, *_, last = scores.values()
    scores["top probability + Mahalanobis (served)"] = combined(first, last)
    print("| score |", " | ".join(sets), "| mean |")
    print("| --- |", " ---: |" * (len(sets) + 1))
    for name, by_set in scores.items():
        areas = [_area(by_set[""], by_set[each]) for each in sets]
        print(f"| {name} |", " | ".join(f"{area:.3f}" for area in areas), f"| {np.mean(areas):.3f} |")


def _area(inside: Array, outside: Array) -> float:
    labels = np.repeat([0, 1], [len(inside), len(outside)])
    return float(roc_auc_score(labels, np.concatenate([inside, outside])))


if __name__ == "__main__":
    main()
