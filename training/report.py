"""Metrics as text, JSON and PNG, and the report of a training run."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Tensor

MANY_CLASSES = 30  # above this, the confusion matrix has no numbers and names
TOP_LOSSES = 24  # images in the plot, 4 x 6


class Mistake(NamedTuple):
    """A misclassified image uint8 [H, W, 3], its true and predicted class, and the confidence in the latter."""

    image: Tensor
    true: str
    predicted: str
    confidence: float


def text(metrics: dict[str, Any]) -> str:
    low, high = metrics["interval_95"]
    width = max(len("class"), *map(len, metrics["per_class"]))
    lines = [
        f"accuracy           {metrics['accuracy']:.2%}  (95 % interval {low:.2%} to {high:.2%}, "
        f"{metrics['images']} images)",
        f"calibration error  {metrics['calibration_error']:.2%}  (15 bins)",
        "",
        f"{'class':{width}}  recall  precision",
    ]
    lines += [f"{name:{width}}  {c['recall']:6.2%}  {c['precision']:9.2%}" for name, c in metrics["per_class"].items()]
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
            title = f"{mistake.predicted} {mistake.confidence:.0%}\nis {mistake.true}"
            axes.set_title(title, fontsize=8, parse_math=False)  # class names may contain dollar signs
    return figure


def confusion_plot(metrics: dict[str, Any]) -> Figure:
    table, names = torch.tensor(metrics["confusion"]), list(metrics["per_class"])
    shares = table / table.sum(1, keepdim=True).clamp(min=1)
    figure = Figure(figsize=(7, 6), layout="constrained")
    axes = figure.subplots()
    axes.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1)
    axes.set(title=f"Accuracy {metrics['accuracy']:.2%}", xlabel="predicted", ylabel="true")
    if len(names) <= MANY_CLASSES:
        axes.set_xticks(range(len(names)), names, rotation=45, ha="right")
        axes.set_yticks(range(len(names)), names)
        for row, column in torch.nonzero(table).tolist():
            colour = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, str(int(table[row, column])), ha="center", va="center", fontsize=8, color=colour)
    return figure


def reliability_plot(metrics: dict[str, Any]) -> Figure:
    filled = [row for row in metrics["reliability"] if row[0]]
    figure = Figure(figsize=(6, 6), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    upper.plot([0, 1], [0, 1], color="grey", linewidth=1, linestyle="--", label="perfect")
    upper.plot([row[1] for row in filled], [row[2] for row in filled], marker="o", label="measured")
    upper.set(title=f"Calibration error {metrics['calibration_error']:.2%}", ylabel="accuracy", xlim=(0, 1))
    upper.legend()
    lower.bar([row[1] for row in filled], [row[0] for row in filled], width=0.04)
    lower.set(xlabel="confidence", ylabel="images", yscale="log")
    return figure


def _matrix(metrics: dict[str, Any], width: int) -> str:
    names = list(metrics["per_class"])
    if len(names) > MANY_CLASSES:
        return "(too many classes for text; see confusion.png)"
    return "\n".join(
        f"{name:{width}}  " + " ".join(f"{count:5d}" for count in row)
        for name, row in zip(names, metrics["confusion"], strict=True)
    )
