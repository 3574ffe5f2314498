"""Measures as text, JSON and PNG."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Tensor

from training import metrics

MANY_CLASSES = 30  # above this the confusion matrix is drawn without numbers and names


class Mistake(NamedTuple):
    """A wrongly classified image, uint8 [H, W, 3], with the true and the claimed class."""

    image: Tensor
    true: str
    claimed: str
    confidence: float


def measure(probabilities: Tensor, labels: Tensor, classes: list[str]) -> dict[str, Any]:
    """All figures of one reading: probabilities [N, classes], labels [N]."""
    accuracy = metrics.accuracy(probabilities, labels)
    table = metrics.confusion(probabilities, labels)
    right, actual, claimed = table.diagonal(), table.sum(1), table.sum(0)
    return {
        "images": len(labels),
        "accuracy": accuracy,
        "interval_95": metrics.wilson(accuracy, len(labels)),
        "calibration_error": metrics.calibration_error(probabilities, labels),
        "per_class": {
            name: {"recall": _share(right[i], actual[i]), "precision": _share(right[i], claimed[i])}
            for i, name in enumerate(classes)
        },
        "confusion": table.tolist(),
        "reliability": metrics.reliability(probabilities, labels),
    }


def text(figures: dict[str, Any]) -> str:
    low, high = figures["interval_95"]
    width = max(len("class"), *map(len, figures["per_class"]))
    lines = [
        f"accuracy           {figures['accuracy']:.2%}  (95 % interval {low:.2%} to {high:.2%}, "
        f"{figures['images']} images)",
        f"calibration error  {figures['calibration_error']:.2%}  (15 bins)",
        "",
        f"{'class':{width}}  recall  precision",
    ]
    lines += [f"{name:{width}}  {c['recall']:6.2%}  {c['precision']:9.2%}" for name, c in figures["per_class"].items()]
    lines += ["", "confusion: rows are true classes, columns predicted ones", _matrix(figures, width)]
    return "\n".join(lines)


def write(folder: Path, figures: dict[str, Any]) -> None:
    """evaluation.json, evaluation.txt, confusion.png and reliability.png; raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "evaluation.json").write_text(json.dumps(figures, indent=1) + "\n")
    (folder / "evaluation.txt").write_text(text(figures) + "\n")
    confusion_plot(figures).savefig(folder / "confusion.png", dpi=120)
    reliability_plot(figures).savefig(folder / "reliability.png", dpi=120)


def write_run(
    folder: Path, title: str, history: Sequence[Mapping[str, float]], figures: dict[str, Any], worst: Sequence[Mistake]
) -> None:
    """report.md with learning curves, confusion, reliability and the worst mistakes; raises OSError."""
    write(folder, figures)
    curves = ""
    if history:
        learning_plot(history).savefig(folder / "learning.png", dpi=120)
        curves = "## Learning curves\n\n![](learning.png)\n\n"
    mistakes_plot(worst).savefig(folder / "mistakes.png", dpi=120)
    (folder / "report.md").write_text(
        f"# {title}\n\n```\n{text(figures)}\n```\n\n{curves}"
        "## Confusion\n\n![](confusion.png)\n\n## Reliability\n\n![](reliability.png)\n\n"
        "## Worst mistakes\n\nThe wrong answers with the most confidence.\n\n![](mistakes.png)\n"
    )


def worst_mistakes(
    images: Tensor, probabilities: Tensor, labels: Tensor, classes: list[str], count: int = 24
) -> list[Mistake]:
    """The wrong answers of most confidence, worst first."""
    confidence, claimed = probabilities.max(1)
    wrong = (claimed != labels).nonzero().flatten()
    order = wrong[confidence[wrong].argsort(descending=True)][:count].tolist()
    return [Mistake(images[i], classes[int(labels[i])], classes[int(claimed[i])], confidence[i].item()) for i in order]


def learning_plot(history: Sequence[Mapping[str, float]]) -> Figure:
    figure = Figure(figsize=(8, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    epochs = [epoch["epoch"] for epoch in history]
    left.plot(epochs, [epoch["loss"] for epoch in history], color="tab:grey")
    left.set(xlabel="epoch", ylabel="loss, augmented training images")
    for key, label in (("train_accuracy", "augmented training images"), ("holdout_accuracy", "held out")):
        right.plot(epochs, [epoch[key] for epoch in history], label=label)
    right.set(xlabel="epoch", ylabel="accuracy")
    right.legend()
    return figure


def mistakes_plot(mistakes: Sequence[Mistake]) -> Figure:
    figure = Figure(figsize=(9, 6), layout="constrained")
    for axes, mistake in zip(figure.subplots(4, 6).flat, [*mistakes, *[None] * 24], strict=False):
        axes.axis("off")
        if mistake:
            axes.imshow(mistake.image.numpy())
            title = f"{mistake.claimed} {mistake.confidence:.0%}\nis {mistake.true}"
            axes.set_title(title, fontsize=8, parse_math=False)  # a class may have a name with dollar signs
    return figure


def confusion_plot(figures: dict[str, Any]) -> Figure:
    table, names = torch.tensor(figures["confusion"]), list(figures["per_class"])
    shares = table / table.sum(1, keepdim=True).clamp(min=1)
    figure = Figure(figsize=(7, 6), layout="constrained")
    axes = figure.subplots()
    axes.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1)
    axes.set(title=f"Accuracy {figures['accuracy']:.2%}", xlabel="predicted", ylabel="true")
    if len(names) <= MANY_CLASSES:
        axes.set_xticks(range(len(names)), names, rotation=45, ha="right")
        axes.set_yticks(range(len(names)), names)
        for row, column in torch.nonzero(table).tolist():
            colour = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, str(int(table[row, column])), ha="center", va="center", fontsize=8, color=colour)
    return figure


def reliability_plot(figures: dict[str, Any]) -> Figure:
    filled = [row for row in figures["reliability"] if row[0]]
    figure = Figure(figsize=(6, 6), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    upper.plot([0, 1], [0, 1], color="grey", linewidth=1, linestyle="--", label="perfect")
    upper.plot([row[1] for row in filled], [row[2] for row in filled], marker="o", label="measured")
    upper.set(title=f"Calibration error {figures['calibration_error']:.2%}", ylabel="accuracy", xlim=(0, 1))
    upper.legend()
    lower.bar([row[1] for row in filled], [row[0] for row in filled], width=0.04)
    lower.set(xlabel="confidence", ylabel="images", yscale="log")
    return figure


def _share(part: Tensor, whole: Tensor) -> float:
    return float(part) / float(whole) if whole else 0.0


def _matrix(figures: dict[str, Any], width: int) -> str:
    names = list(figures["per_class"])
    if len(names) > MANY_CLASSES:
        return "(too many classes for text; see confusion.png)"
    return "\n".join(
        f"{name:{width}}  " + " ".join(f"{count:5d}" for count in row)
        for name, row in zip(names, figures["confusion"], strict=True)
    )
