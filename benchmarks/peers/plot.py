"""Draws the results.json files of the peers' harness as bars.

python -m benchmarks.peers.plot RESULTS... --out FILE.png
"""

import argparse
import json
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

PANELS = (
    ("p50 of a lone client, ms", 1, 1, "p50_ms"),
    ("images/s, one a request, 64 clients", 1, 64, "images_per_s"),
    ("images/s, 64 a request, 64 clients", 64, 64, "images_per_s"),
)
OURS, THEIRS = "#2563eb", "#9ca3af"


def draw(rows: list[dict[str, Any]]) -> Figure:
    """One panel a measure, one bar a server, the best on top."""
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    for axes, (title, images, concurrency, key) in zip(figure.subplots(1, len(PANELS)), PANELS, strict=True):
        values = {
            row["name"]: row[key]
            for row in rows
            if row["images_per_request"] == images and row["concurrency"] == concurrency
        }
        names = sorted(values, key=lambda name: values[name], reverse=key == "p50_ms")
        colours = [OURS if name.startswith("thirtytwo") else THEIRS for name in names]
        bars = axes.barh(names, [values[name] for name in names], color=colours)
        axes.bar_label(bars, fmt="%.3g" if key == "p50_ms" else "%.0f", padding=3, fontsize=8)
        axes.set_title(title, fontsize=10)
        axes.margins(x=0.18)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peers.plot", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("results", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    rows = [row for file in arguments.results for row in json.loads(file.read_text())["rows"]]
    draw(rows).savefig(arguments.out, dpi=120)


if __name__ == "__main__":
    main()
