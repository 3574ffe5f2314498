"""Reports what is wrong with a data set, as text, JSON and pages of pictures.

python -m training.audit --data DIR
"""

import argparse
from functools import partial
from pathlib import Path

from app.model import weights
from app.model.weights import BUNDLED
from training import cli
from training.audit import embedding, findings, page
from training.datasets import selection
from training.datasets.discovery import open_listing


def run(arguments: argparse.Namespace) -> None:
    size = weights.load(arguments.weights).card.input_size
    with open_listing(arguments.data, arguments.dataset) as listing:
        found = findings.audit(listing, size, partial(embedding.embed, arguments.weights))
    folder = arguments.out or Path("runs") / f"audit-{arguments.data.resolve().name}"
    page.write(folder, found)
    print(*page.overview(found), f"Pages and JSON are in {folder}", sep="\n")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = cli.Parser(
        prog="python -m training.audit", description=(__doc__ or "").splitlines()[0], allow_abbrev=False
    )
    selection.add_source_flags(parser)
    add = parser.add_argument
    add("--out", type=Path, metavar="DIR", help="folder for the pages and JSON [runs/audit-<name>]")
    add("--weights", type=Path, default=BUNDLED, metavar="FILE", help="weights file for the features [the bundled one]")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    with cli.errors_in_one_line():
        run(parse(argv))


if __name__ == "__main__":
    main()
