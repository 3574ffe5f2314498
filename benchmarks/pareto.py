"""Compares weights files: what each costs in serving, and what its accuracy is. Prints a table, draws a plot.

    python -m benchmarks.pareto weights/*.safetensors --out frontier.png

Accuracies are those of the held-out images, by which one chooses; the test images are not read.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib.figure import Figure

from app import engines
from app.errors import ThirtytwoError
from app.model import weights
from benchmarks import throughput

BATCHES = (1, 64)  # a lone picture; a busy service


class Point(NamedTuple):
    """Accuracies are shares of 1; images/s are of this machine, for each of BATCHES."""

    name: str
    gflops: float
    megabytes: float
    images_per_s: tuple[float, ...]
    accuracy: float
    interval_95: tuple[float, float]
    training_s: int


def point(file: Path, seconds: float = 2.0) -> Point:
    """Raises WeightsError."""
    loaded = weights.load(file)
    card, rates = loaded.card, throughput.measure(engines.load(loaded), loaded.card.input_size, BATCHES, seconds)
    low, high = card.results["holdout_accuracy_interval"]
    return Point(
        card.name,
        card.forward_gflops or 0.0,
        file.stat().st_size / 1e6,
        tuple(rates[batch] for batch in BATCHES),
        card.results["holdout_accuracy"],
        (low, high),
        card.results["training_s"],
    )


def table(points: Sequence[Point]) -> str:
    """Markdown."""
    speeds = [f"images/s, batch {batch}" for batch in BATCHES]
    lines = [
        f"| network | GFLOPs | MB | {' | '.join(speeds)} | held-out accuracy | 95 % interval | training s |",
        "| --- |" + " ---: |" * (6 + len(BATCHES)),
    ]
    for p in points:
        rates = " | ".join(f"{rate:,.0f}" for rate in p.images_per_s)
        low, high = p.interval_95
        lines.append(
            f"| {p.name} | {p.gflops:.3g} | {p.megabytes:.1f} | {rates} | {p.accuracy:.2%} | {low:.2%} to {high:.2%} "
            f"| {p.training_s:,} |"
        )
    return "\n".join(lines)


def plot(points: Sequence[Point]) -> Figure:
    """Accuracy against operations, and against speed with a busy service's batches."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    costs = [p.gflops for p in points], [p.images_per_s[-1] for p in points]
    for axes, values in zip((left, right), costs, strict=True):
        bars = [[p.accuracy - p.interval_95[0] for p in points], [p.interval_95[1] - p.accuracy for p in points]]
        axes.errorbar(values, [p.accuracy for p in points], yerr=bars, fmt="o", capsize=3)
        for value, p in zip(values, points, strict=True):
            axes.annotate(p.name, (value, p.accuracy), (6, -10), textcoords="offset points", fontsize=8)
        axes.set_xscale("log")
        axes.set_xticks(values, [f"{value:,.3g}" if value < 1 else f"{value:,.0f}" for value in values])
        axes.minorticks_off()
        axes.margins(x=0.2)
        axes.grid(alpha=0.3)
    left.set(xlabel="GFLOPs an image", ylabel="held-out accuracy, 95 % interval")
    right.set(xlabel=f"images/s in batches of {BATCHES[-1]}")
    return figure


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pareto", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("weights", type=Path, nargs="+", metavar="FILE", help="weights files to compare")
    parser.add_argument("--out", type=Path, metavar="PNG", help="where to draw them")
    arguments = parser.parse_args(argv)
    try:
        points = sorted((point(file) for file in arguments.weights), key=lambda p: p.gflops)
        print(table(points))
        if arguments.out:
            plot(points).savefig(arguments.out, dpi=120)
    except (ThirtytwoError, OSError) as error:
        sys.exit(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
