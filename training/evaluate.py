"""Evaluates a weights file on a data folder's test images, with the engine that serves it.

python -m training.evaluate --weights FILE --data DIR
"""

import argparse
import sys
from functools import partial
from pathlib import Path

from app import engines
from app.model import weights
from app.model.card import ModelCard
from app.model.weights import BUNDLED
from training import cli, data, metrics, report
from training.data import Dataset
from training.datasets import selection


def run(arguments: argparse.Namespace) -> None:
    loaded = weights.load(arguments.weights)
    card = loaded.card
    dataset = data.load(arguments.data, card.input_size, ["test"], selection.from_flags(arguments))
    cli.print_remarks(dataset.rejected, [*dataset.notes, *_warnings(dataset, card)])
    dataset = data.with_labels_of(card.classes, dataset, arguments.data)
    predict = partial(metrics.predict, engines.load(loaded, arguments.device))
    probabilities = predict(dataset.test.images)
    results = metrics.classification_metrics(probabilities, dataset.test.labels, card.classes)
    results |= {"name": card.name, "version": loaded.version, "card_accuracy": card.test_accuracy}
    recorded = "no test accuracy" if card.test_accuracy is None else f"test accuracy {card.test_accuracy:.2%}"
    sections = [f"{card.name} {loaded.version}, {recorded} on its card", report.text(results)]
    if not arguments.no_robustness:
        rows = [metrics.evaluate("as served", probabilities, dataset.test.labels)]
        rows += metrics.evaluate_tta(predict, dataset.test) + metrics.evaluate_lossy_formats(predict, dataset.test)
        results["robustness"] = [row._asdict() for row in rows]
        sections.append(metrics.table(rows))
    folder = arguments.out or Path("runs") / f"evaluate-{loaded.version}"
    report.write(folder, results)
    print(*sections, f"JSON and plots are in {folder}", sep="\n\n")


def _warnings(dataset: Dataset, card: ModelCard) -> list[str]:
    """That the test images may have trained the network: they are a part of a folder that has no part of its own."""
    parts = data.other_test_part(dataset, [each.recipe for each in card.networks or [card]])
    if not dataset.held_out[0] or not parts:
        return []
    return [f"The file was trained with {parts}: if the folder is the same, these images have trained it."]


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = cli.Parser(
        prog="python -m training.evaluate", description=(__doc__ or "").splitlines()[0], allow_abbrev=False
    )
    add = parser.add_argument
    add("--weights", type=Path, default=BUNDLED, metavar="FILE", help="weights file [the bundled one]")
    selection.add_flags(parser)
    add("--out", type=Path, metavar="DIR", help="folder for JSON, text and plots [runs/evaluate-<version>]")
    add("--device", default="auto", help="auto, cpu, cuda or mps [%(default)s]")
    add("--no-robustness", action="store_true", help="skip test-time augmentation and lossy formats")
    return parser.parse_args(cli.replace_deprecated(sys.argv[1:] if argv is None else argv, {"quick": "no_robustness"}))


def main(argv: list[str] | None = None) -> None:
    with cli.errors_in_one_line():
        run(parse(argv))


if __name__ == "__main__":
    main()
