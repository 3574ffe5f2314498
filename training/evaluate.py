"""Measures a weights file on a data folder's test images, with the engine that serves it.

python -m training.evaluate --weights FILE --data DIR
"""

import argparse
import sys
from functools import partial
from pathlib import Path

from app import engines
from app.errors import DataError, ThirtytwoError
from app.model import weights
from app.model.weights import BUNDLED
from benchmarks import throughput
from training import data, metrics, report


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m training.evaluate", description=__doc__.splitlines()[0])
    parser.add_argument("--weights", type=Path, default=BUNDLED, metavar="FILE", help="default: the bundled ones")
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="as for python -m training.train")
    parser.add_argument("--out", type=Path, metavar="DIR", help="for JSON, text and plots [runs/evaluate-<version>]")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps [%(default)s]")
    parser.add_argument("--quick", action="store_true", help="one view as served only, without the further readings")
    parser.add_argument("--speed", action="store_true", help="measure images/s as well, on a machine that rests")
    return parser.parse_args(argv)


def run(arguments: argparse.Namespace) -> None:
    loaded = weights.load(arguments.weights)
    card = loaded.card
    dataset = data.load(arguments.data, card.input_size, ["test"])
    if dataset.classes != card.classes:
        raise DataError(f"{arguments.data} has other classes than the weights: {', '.join(dataset.classes)}.")
    run = engines.load(loaded, arguments.device)
    answer = partial(metrics.served, run)
    probabilities = answer(dataset.test.images)
    figures = report.measure(probabilities, dataset.test.labels, card.classes)
    figures |= {"name": card.name, "version": loaded.version, "card_accuracy": card.test_accuracy}
    claimed = "no test accuracy" if card.test_accuracy is None else f"{card.test_accuracy:.2%}"
    told = [f"{card.name} {loaded.version}, {claimed} on its card", report.text(figures)]
    if not arguments.quick:
        rows = [metrics.take("one view, as served", probabilities, dataset.test.labels)]
        rows += metrics.of_views(answer, dataset.test) + metrics.of_formats(answer, dataset.test)
        figures["readings"] = [row._asdict() for row in rows]
        told.append(metrics.table(rows))
    if arguments.speed:
        figures["speed"] = throughput.figures(run, card.input_size)
        told.append(f"{figures['speed']['machine']}:\n\n{throughput.table(figures['speed']['images_per_s'])}")
    folder = arguments.out or Path("runs") / f"evaluate-{loaded.version}"
    report.write(folder, figures)
    print(*told, f"JSON and plots are in {folder}", sep="\n\n")


def main(argv: list[str] | None = None) -> None:
    try:
        run(parse(argv))
    except (ThirtytwoError, OSError) as error:
        sys.exit(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
