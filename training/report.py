"""Metrics as text, JSON and PNG, and the report of a training run."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from sklearn.calibration import CalibrationDisplay
from sklearn.metrics import ConfusionMatrixDisplay
from torch import Tensor

MANY_CLASSES = 30  # above this, the confusion matrix has no numbers and names
TOP_LOSSES = 24  # images in the plot, 4 x 6
LABEL_LENGTH = 20  # characters of a class name in a plot


class Mistake(NamedTuple):
    """A misclassified image uint8 [H, W, 3], its true and predicted class, and the confidence in the latter."""

    image: Tensor
    true: str
    predicted: str
    confidence: float


def text(metrics: dict[str, Any]) -> str:
    """Accuracy, calibration error, a table of the classes and the confusion matrix."""
    low, high = metrics["interval_95"]
    # Plain columns rather than classification_report's text, which has two digits and no accuracy interval.
    width = max(len("macro average"), *map(len, metrics["per_class"]))
    rows = [*metrics["per_class"].items(), ("macro average", metrics["macro_average"])]
    lines = [
        f"accuracy           {metrics['accuracy']:.2%}  (95 % interval {low:.2%} to {high:.2%}, "
        f"{metrics['images']} images)",
        f"calibration error  {metrics['calibration_error']:.2%}  (15 bins)",
        "",
        f"{'class':{width}}  precision  recall  f1-score  images",
    ]
    lines += [
        f"{name:{width}}  {row['precision']:9.2%}  {row['recall']:6.2%}  {row['f1-score']:8.2%}  {row['support']:6.0f}"
        for name, row in rows
    ]
    lines += ["", "confusion matrix: true classes in rows, predicted classes in columns", _matrix(metrics, width)]
    return "\n".join(lines)


def write(folder: Path, metrics: dict[str, Any]) -> None:
    """evaluation.json, evaluation.txt, confusion.png and reliability.png; raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "evaluation.json").write_text(json.dumps(metrics, indent=1) + "\n")
    (folder / "evaluation.txt").write_text(text(metrics) + "\n")
    confusion_plot(metrics).savefig(folder / "confusion.png", dpi=120)
    reliability_plot(metrics).savefig(folder / "reliability.png", dpi=120)


def write_run(
    folder: Path,
    title: str,
    history: Sequence[Mapping[str, float]],
    metrics: dict[str, Any],
    mistakes: Sequence[Mistake],
) -> None:
    """`write`, and report.md with learning curves and the top losses; raises OSError."""
    write(folder, metrics)
    curves = ""
    if history:
        learning_plot(history).savefig(folder / "learning.png", dpi=120)
        curves = "## Learning curves\n\n![](learning.png)\n\n"
    mistakes_plot(mistakes).savefig(folder / "mistakes.png", dpi=120)
    (folder / "report.md").write_text(
        f"# {title}\n\n```\n{text(metrics)}\n```\n\n{curves}"
        "## Confusion\n\n![](confusion.png)\n\n## Reliability\n\n![](reliability.png)\n\n"
        "## Top losses\n\nThe misclassified images of highest confidence.\n\n![](mistakes.png)\n"
    )


def top_losses(
    images: Tensor, probabilities: Tensor, labels: Tensor, classes: list[str], count: int = TOP_LOSSES
) -> list[Mistake]:
    """The misclassified images of highest confidence, highest first."""
    confidence, predicted = probabilities.max(1)
    wrong = (predicted != labels).nonzero().flatten()
    order = wrong[confidence[wrong].argsort(descending=True)][:count].tolist()
    return [
        Mistake(images[i], classes[int(labels[i])], classes[int(predicted[i])], confidence[i].item()) for i in order
    ]


def learning_plot(history: Sequence[Mapping[str, float]]) -> Figure:
    # Figure rather than pyplot: no global state, no display.
    figure = Figure(figsize=(8, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    epochs = [epoch["epoch"] for epoch in history]
    left.plot(epochs, [epoch["loss"] for epoch in history], color="tab:grey")
    left.set(xlabel="epoch", ylabel="training loss (augmented)")
    for key, label in (("train_accuracy", "training (augmented)"), ("val_accuracy", "validation")):
        right.plot(epochs, [epoch[key] for epoch in history], label=label)
    right.set(xlabel="epoch", ylabel="accuracy")
    right.legend()
    return figure


def mistakes_plot(mistakes: Sequence[Mistake]) -> Figure:
    figure = Figure(figsize=(9, 6), layout="constrained")
    for axes, mistake in zip(figure.subplots(4, 6).flat, [*mistakes, *[None] * TOP_LOSSES], strict=False):
        axes.axis("off")
        if mistake:
            axes.imshow(mistake.image.numpy())
            title = f"{mistake.predicted[:LABEL_LENGTH]} {mistake.confidence:.0%}\nis {mistake.true[:LABEL_LENGTH]}"
            axes.set_title(title, fontsize=8, parse_math=False)  # class names may contain dollar signs
    return figure


def confusion_plot(metrics: dict[str, Any]) -> Figure:
    """The confusion matrix; without numbers and names for many classes."""
    figure = Figure(figsize=(7, 6), layout="constrained")
    axes = figure.subplots()
    few = len(metrics["per_class"]) <= MANY_CLASSES
    names = [_label(name) for name in metrics["per_class"]]
    display = ConfusionMatrixDisplay(np.array(metrics["confusion"]), display_labels=names if few else None)
    display.plot(ax=axes, include_values=few, cmap="Blues", xticks_rotation=45, colorbar=False)
    axes.set(title=f"Accuracy {metrics['accuracy']:.2%}")
    if not few:
        axes.set(xticks=[], yticks=[])
    return figure


def reliability_plot(metrics: dict[str, Any]) -> Figure:
    """Accuracy against confidence, and the number of images in each bin."""
    bins = metrics["reliability"]
    figure = Figure(figsize=(6, 6), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    CalibrationDisplay(np.array(bins["accuracy"]), np.array(bins["confidence"]), None).plot(ax=upper, name="measured")
    upper.set(title=f"Calibration error {metrics['calibration_error']:.2%}", xlabel="", ylabel="accuracy", xlim=(0, 1))
    # Most images have a confidence near 1; the logarithm keeps the other bins visible.
    lower.bar(bins["confidence"], bins["count"], width=0.04)
    lower.set(xlabel="confidence", ylabel="images", yscale="log")
    return figure


def _label(name: str) -> str:
    """A class name as tick label: at most LABEL_LENGTH characters, dollar signs escaped from matplotlib's formulas."""
    short = name if len(name) <= LABEL_LENGTH else name[: LABEL_LENGTH - 1] + "…"
    return short.replace("$", r"\$")


def _matrix(metrics: dict[str, Any], width: int) -> str:
    names = list(metrics["per_class"])
    if len(names) > MANY_CLASSES:
        return "(too many classes for text; see confusion.png)"
    return "\n".join(
        f"{name:{width}}  " + " ".join(f"{count:5d}" for count in row)
        for name, row in zip(names, metrics["confusion"], strict=True)
    )
