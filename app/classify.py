"""`python -m app classify FILE...`: the predictions of `/predict` without a server."""

import argparse
import asyncio
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from app import settings
from app.errors import RequestError, ThirtytwoError, UndecodableImage
from app.inference.classifier import top_classes
from app.inference.decoding import File
from app.inference.pipeline import Deadline, Pipeline, Prediction
from app.lifespan import build_classifier, build_pipeline, load_engine

TIMEOUT_S = 3600.0  # of one chunk; a local user waits


def run(argv: list[str]) -> int:
    """Prints a line per file; returns 0 if all are classified, 1 if some are not, 2 if the model cannot be loaded."""
    arguments = _parse(argv)
    try:
        config = settings.load()
        config = config.model_copy(update={"weights": arguments.weights or config.weights, "workers": 1})
        classifier = build_classifier(config, load_engine)
    except ThirtytwoError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    pipeline, classes = build_pipeline(config, classifier), classifier.classes
    top_k = max(1, min(arguments.top_k, len(classes)))
    pipeline.start()
    try:
        outcomes = asyncio.run(_classify(arguments.files, pipeline, config.max_batch))
    finally:
        pipeline.close(0)
    return max([_print(path, outcome, classes, top_k, arguments.json) for path, outcome in outcomes])


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m app classify", description="Classifies image files.")
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--weights", type=Path, metavar="FILE", help="weights file [the bundled one]")
    parser.add_argument("--top-k", type=int, default=3, metavar="N", help="labels per file [3]")
    parser.add_argument("--json", action="store_true", help="one JSON object per line")
    return parser.parse_args(argv)


async def _classify(
    paths: Sequence[Path], pipeline: Pipeline, chunk: int
) -> list[tuple[Path, Prediction | RequestError]]:
    outcomes: list[Prediction | RequestError] = []
    for start in range(0, len(paths), chunk):
        files = [_read(path) for path in paths[start : start + chunk]]
        outcomes += (await pipeline.classify(files, Deadline.after(TIMEOUT_S))).outcomes
    return list(zip(paths, outcomes, strict=True))


def _read(path: Path) -> File:
    try:
        return path.read_bytes()
    except OSError as error:
        return UndecodableImage(f"{error.strerror}.")


def _print(path: Path, outcome: Prediction | RequestError, classes: list[str], top_k: int, as_json: bool) -> int:
    if isinstance(outcome, RequestError):
        print(f"{path}: {outcome}", file=sys.stderr)
        return 1
    top = top_classes(outcome.probabilities, top_k, classes)
    if as_json:
        print(json.dumps({"file": str(path), "top": top, "resized_from": outcome.resized_from}))
    else:
        print(f"{path}: " + ", ".join(f"{entry['label']} {entry['probability']:.1%}" for entry in top))
    return 0
