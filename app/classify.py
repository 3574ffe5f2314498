"""`python -m app classify FILE...`: the answers of `/predict` without a server."""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from app import engines, settings
from app.errors import RequestError, ThirtytwoError
from app.inference.classifier import Classifier
from app.model import tta, weights
from app.model.preprocessing import DecodedImage, Limits, decode
from app.settings import Settings


def run(argv: list[str]) -> int:
    """Prints a line a file; gives 0 where all were classified, 1 where some were not, 2 where none can be."""
    arguments = _parse(argv)
    try:
        config = settings.load()
        file = weights.load(arguments.weights or config.weights)
        runner = engines.load(file, config.device, config.threads, config.engine, config.precision)
    except ThirtytwoError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    classifier = Classifier(file, runner, batch_sizes=())
    return max([_classify(path, classifier, config, arguments.top_k, arguments.json) for path in arguments.files])


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m app classify", description="Classifies image files.")
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--weights", type=Path, metavar="FILE", help="weights file [the bundled one]")
    parser.add_argument("--top-k", type=int, default=3, metavar="N", help="labels a file [3]")
    parser.add_argument("--json", action="store_true", help="a JSON object a line")
    return parser.parse_args(argv)


def _classify(path: Path, classifier: Classifier, config: Settings, top_k: int, as_json: bool) -> int:
    limits = Limits(classifier.input_size, config.max_pixels, config.strict_size)
    try:
        picture = decode(path.read_bytes(), limits)
    except (RequestError, OSError) as error:
        print(f"{path}: {error}", file=sys.stderr)
        return 1
    probabilities = _look(picture, classifier, config.second_look)
    top = classifier.top(probabilities.tolist(), max(1, min(top_k, len(classifier.classes))))
    if as_json:
        print(json.dumps({"file": str(path), "top": top, "resized_from": picture.resized_from}))
    else:
        print(f"{path}: " + ", ".join(f"{entry['label']} {entry['probability']:.1%}" for entry in top))
    return 0


def _look(picture: DecodedImage, classifier: Classifier, sure: float) -> NDArray[np.float32]:
    (first,) = classifier.classify([picture.pixels])
    if not picture.lossy or not tta.in_doubt(first, sure):
        return first
    (second,) = classifier.classify([tta.mirrored(picture.pixels)])
    return tta.merged(first, second)
