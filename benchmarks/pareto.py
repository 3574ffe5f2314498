"""Accuracy against cost of several weights files, as a table and a plot.

    python -m benchmarks.pareto weights/*.safetensors --out pareto.png

Accuracies are those on the validation images, which are for such choices; the test images are not read.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib.figure import Figure

from app import engines
from app.errors import ThirtytwoError, WeightsError
from app.model import weights
from benchmarks import throughput
from benchmarks.images import noise

BATCHES = (1, 64)  # one client; a busy service


class Point(NamedTuple):
    """Accuracies are shares of 1; images/s are measured here, for each of BATCHES."""

    name: str
    gflops: float
    megabytes: float
    images_per_s: tuple[float, ...]
    accuracy: float
    interval_95: tuple[float, float]
    training_s: int


def measure(file: Path, seconds: float) -> Point:
    """Raises WeightsError, also where the card has no validation accuracy."""
    loaded = weights.load(file)
    card, results = loaded.card, loaded.card.results
    split = "val" if "val_accuracy" in results else "holdout"  # the name in files from before 0.1
    if f"{split}_accuracy" not in results:
        raise WeightsError(f"{file} has no validation accuracy on its card.")
    rates = throughput.measure(engines.load(loaded), noise(size=card.input_size), BATCHES, seconds)
    low, high = results[f"{split}_accuracy_interval"]
    return Point(
        card.name,
        card.forward_gflops or 0.0,
        file.stat().st_size / 1e6,
        tuple(rates[batch] for batch in BATCHES),
        results[f"{split}_accuracy"],
        (low, high),
        # The seconds of a cascade are those of its networks.
        results.get("training_s") or sum(network.results.get("training_s", 0) for network in card.networks),
    )


def table(points: Sequence[Point]) -> str:
    """Markdown."""
    speeds = [f"images/s, batch {batch}" for batch in BATCHES]
    lines = [
        f"| network | GFLOPs | MB | {' | '.join(speeds)} | validation accuracy | 95 % interval | training s |",
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
    """Accuracy against operations, and against images/s in large batches."""
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
    left.set(xlabel="GFLOPs per image", ylabel="validation accuracy, 95 % interval")
    right.set(xlabel=f"images/s in batches of {BATCHES[-1]}")
    return figure


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pareto", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("weights", type=Path, nargs="+", metavar="FILE", help="weights files to compare")
    parser.add_argument("--out", type=Path, metavar="PNG", help="file for the plot")
    parser.add_argument("--seconds", type=float, default=2.0, metavar="FLOAT", help="per batch size [%(default)s]")
    arguments = parser.parse_args(argv)
    try:
        points = sorted((measure(file, arguments.seconds) for file in arguments.weights), key=lambda p: p.gflops)
        print(table(points))
        if arguments.out:
            plot(points).savefig(arguments.out, dpi=120)
    except (ThirtytwoError, OSError) as error:
        sys.exit(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
