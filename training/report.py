"""Measures as text, JSON and PNG."""

import json
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from matplotlib.figure import Figure
from torch import Tensor

from training import measures

MANY_CLASSES = 30  # above this the confusion matrix is drawn without numbers and names

mpl.rcParams["svg.hashsalt"] = "thirtytwo"


def measure(probabilities: Tensor, labels: Tensor, classes: list[str]) -> dict[str, Any]:
    """All figures of one reading: probabilities [N, classes], labels [N]."""
    accuracy = measures.accuracy(probabilities, labels)
    table = measures.confusion(probabilities, labels)
    right, actual, claimed = table.diagonal(), table.sum(1), table.sum(0)
    return {
        "images": len(labels),
        "accuracy": accuracy,
        "interval_95": measures.wilson(accuracy, len(labels)),
        "calibration_error": measures.calibration_error(probabilities, labels),
        "per_class": {
            name: {"recall": _share(right[i], actual[i]), "precision": _share(right[i], claimed[i])}
            for i, name in enumerate(classes)
        },
        "confusion": table.tolist(),
        "reliability": measures.reliability(probabilities, labels),
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
