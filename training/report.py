"""Metrics as text, JSON and PNG, and the report of a training run."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unicodedata import combining, east_asian_width
from warnings import catch_warnings, filterwarnings

import numpy as np
from matplotlib.figure import Figure
from sklearn.calibration import CalibrationDisplay
from sklearn.metrics import ConfusionMatrixDisplay
from torch import Tensor

MANY_CLASSES = 30  # above this, the confusion matrix has no numbers and names, and its text lists pairs
CONFUSED_PAIRS = 20
WARNED_CLASSES = 10
TEXT_LENGTH = 60  # characters of a class name in text
TOP_LOSSES = 24  # images in the plot, 4 x 6
LABEL_LENGTH = 20  # characters of a class name in a plot


class Mistake(NamedTuple):
    """A misclassified image uint8 [H, W, 3], its true and predicted class, and the confidence in the latter."""

    image: Tensor
    true: str
    predicted: str
    confidence: float


def text(metrics: dict[str, Any]) -> str:
    """Accuracy, calibration error, a table of the classes, and the confusion matrix or the most confused pairs."""
    low, high = metrics["interval_95"]
    # Plain columns rather than classification_report's text, which has two digits and no accuracy interval.
    width = max(len("macro average"), *(_columns(_short(name)) for name in metrics["per_class"]))
    rows = [*metrics["per_class"].items(), ("macro average", metrics["macro_average"])]
    lines = [
        f"accuracy           {metrics['accuracy']:.2%}  (95 % interval {low:.2%} to {high:.2%}, "
        f"{metrics['images']} images)",
        f"balanced accuracy  {metrics['balanced_accuracy']:.2%}  (mean recall of the classes)",
        f"macro F1           {metrics['macro_f1']:.2%}",
        f"majority baseline  {metrics['majority_baseline']:.2%}  (accuracy of the most frequent class alone)",
        f"calibration error  {metrics['calibration_error']:.2%}  (15 bins)",
        *warnings(metrics),
        "",
        f"{'class':{width}}  precision  recall  f1-score  images",
    ]
    lines += [
        f"{_padded(name, width)}  {row['precision']:9.2%}  {row['recall']:6.2%}  {row['f1-score']:8.2%}  "
        f"{row['support']:6.0f}"
        for name, row in rows
    ]
    pairs = confused_pairs(metrics)
    if len(metrics["per_class"]) <= MANY_CLASSES:
        lines += ["", "confusion matrix: true classes in rows, predicted classes in columns", _matrix(metrics, width)]
    elif pairs:
        lines += ["", "most confused pairs: images, true class, predicted class"]
        lines += [f"{count:5d}  {_padded(true, width)}  {_short(predicted)}" for count, true, predicted in pairs]
    return "\n".join(lines)


def warnings(metrics: dict[str, Any]) -> list[str]:
    """One line for classes that are never predicted, if there are any."""
    missing = metrics["never_predicted"]
    if not missing:
        return []
    names = ", ".join(map(_short, missing[:WARNED_CLASSES])) + (", ..." if len(missing) > WARNED_CLASSES else "")
    return [f"warning: never predicted: {names} ({len(missing)} of {len(metrics['per_class'])} classes)"]


def class_counts(classes: Sequence[str], labels: Tensor) -> str:
    """Images of each class, most first; of many classes the extremes only."""
    counts = sorted(zip(labels.bincount(minlength=len(classes)).tolist(), classes, strict=True), reverse=True)
    if len(counts) > MANY_CLASSES:
        counts = [*counts[: MANY_CLASSES // 2], (-1, ""), *counts[-MANY_CLASSES // 2 :]]
    width = max(_columns(_short(name)) for _, name in counts)
    share = 100 / max(1, len(labels))
    return "\n".join(
        "..." if count < 0 else f"{_padded(name, width)}  {count:6d}  {count * share:5.1f} %" for count, name in counts
    )


def confused_pairs(metrics: dict[str, Any], count: int = CONFUSED_PAIRS) -> list[tuple[int, str, str]]:
    """(images, true class, predicted class) of the largest entries of the confusion matrix off its diagonal."""
    confusion, names = np.array(metrics["confusion"]), list(metrics["per_class"])
    np.fill_diagonal(confusion, 0)
    order = np.argsort(-confusion, axis=None, kind="stable")[:count]
    pairs = (divmod(int(i), len(names)) for i in order)
    return [(int(confusion[i, j]), names[i], names[j]) for i, j in pairs if confusion[i, j]]


def write(folder: Path, metrics: dict[str, Any]) -> None:
    """evaluation.json, evaluation.txt, confusion.png and reliability.png; raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "evaluation.json").write_text(json.dumps(metrics, indent=1) + "\n")
    (folder / "evaluation.txt").write_text(text(metrics) + "\n")
    _save(confusion_plot(metrics), folder / "confusion.png")
    _save(reliability_plot(metrics), folder / "reliability.png")


def write_run(
    folder: Path,
    title: str,
    history: Sequence[Mapping[str, float]],
    metrics: dict[str, Any],
    mistakes: Sequence[Mistake],
    sections: Mapping[str, str] | None = None,
) -> None:
    """`write`, and report.md with `sections` of text, learning curves and the top losses; raises OSError."""
    write(folder, metrics)
    curves = ""
    if history:
        _save(learning_plot(history), folder / "learning.png")
        curves = "## Learning curves\n\n![](learning.png)\n\n"
    _save(mistakes_plot(mistakes), folder / "mistakes.png")
    facts = "".join(f"## {title}\n\n```\n{text}\n```\n\n" for title, text in (sections or {}).items())
    (folder / "report.md").write_text(
        f"# {title}\n\n```\n{text(metrics)}\n```\n\n{facts}{curves}"
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
    for key, label in (("loss", "training (augmented)"), ("val_loss", "validation")):
        left.plot(epochs, [epoch[key] for epoch in history], label=label)
    left.set(xlabel="epoch", ylabel="loss")
    left.legend()
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


def _save(figure: Figure, file: Path) -> None:
    with catch_warnings():
        # matplotlib's font has no CJK characters; it draws a box for each.
        filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(file, dpi=120)


def _label(name: str) -> str:
    """A class name as tick label: at most LABEL_LENGTH characters, dollar signs escaped from matplotlib's formulas."""
    return _short(name, LABEL_LENGTH).replace("$", r"\$")


def _short(name: str, length: int = TEXT_LENGTH) -> str:
    return name if len(name) <= length else name[: length - 1] + "…"


def _columns(text: str) -> int:
    """Width in a terminal: wide characters have two columns, combining ones none."""
    return sum(0 if combining(each) else 2 if east_asian_width(each) in "WF" else 1 for each in text)


def _padded(name: str, width: int) -> str:
    short = _short(name)
    return short + " " * (width - _columns(short))


def _matrix(metrics: dict[str, Any], width: int) -> str:
    return "\n".join(
        f"{_padded(name, width)}  " + " ".join(f"{count:5d}" for count in row)
        for name, row in zip(metrics["per_class"], metrics["confusion"], strict=True)
    )
