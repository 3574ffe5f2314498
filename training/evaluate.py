"""Measures a weights file on a data folder's test images, with the engine that serves it.

python -m training.evaluate --weights FILE --data DIR
"""

import argparse
import sys
from pathlib import Path

from app.errors import DataError, ThirtytwoError
from app.model import weights
from app.model.weights import BUNDLED
from training import data, export, report


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m training.evaluate", description=__doc__.splitlines()[0])
    parser.add_argument("--weights", type=Path, default=BUNDLED, metavar="FILE", help="default: the bundled ones")
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="as for python -m training.train")
    parser.add_argument("--out", type=Path, metavar="DIR", help="for JSON, text and plots [runs/evaluate-<version>]")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps [%(default)s]")
    return parser.parse_args(argv)


def run(arguments: argparse.Namespace) -> None:
    loaded = weights.load(arguments.weights)
    card = loaded.card
    dataset = data.load(arguments.data, card.input_size, ["test"])
    if dataset.classes != card.classes:
        raise DataError(f"{arguments.data} has other classes than the weights: {', '.join(dataset.classes)}.")
    probabilities = export.served(loaded, dataset.test.images, arguments.device)
    figures = report.measure(probabilities, dataset.test.labels, card.classes)
    figures |= {"name": card.name, "version": loaded.version, "card_accuracy": card.test_accuracy}
    folder = arguments.out or Path("runs") / f"evaluate-{loaded.version}"
    report.write(folder, figures)
    claimed = "no test accuracy" if card.test_accuracy is None else f"{card.test_accuracy:.2%}"
    print(
        f"{card.name} {loaded.version}, {claimed} on its card\n\n{report.text(figures)}\n\n"
        f"JSON and plots are in {folder}"
    )


def main(argv: list[str] | None = None) -> None:
    try:
        run(parse(argv))
    except (ThirtytwoError, OSError) as error:
        sys.exit(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
