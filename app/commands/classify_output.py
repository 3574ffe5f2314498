"""The formats of `python -m app classify`: text, JSON lines, CSV."""

import csv
import json
import os
import sys
from abc import ABC, abstractmethod
from io import TextIOWrapper
from typing import Any, TextIO

from app.api.problems import TYPE
from app.errors import RequestError
from app.inference.classifier import ood_fields, top_classes
from app.inference.pipeline import Prediction
from app.model.ood import is_ood

CONTROLS = {code: f"\\x{code:02x}" for code in (*range(32), 127)}

Outcome = Prediction | RequestError


class Output(ABC):
    """Writes a line per file, for a prediction the top_k classes, best first."""

    def __init__(self, stream: TextIO, classes: list[str], top_k: int) -> None:
        self.stream = in_utf8(stream)
        self.top_k = top_k
        self._classes = classes

    @abstractmethod
    def write(self, name: str, outcome: Outcome) -> None: ...

    def top(self, prediction: Prediction) -> list[dict[str, Any]]:
        return top_classes(prediction.probabilities, self.top_k, self._classes)


class Text(Output):
    """Errors go to stderr."""

    def write(self, name: str, outcome: Outcome) -> None:
        name = name.translate(CONTROLS)  # a line feed in a name begins no line of the output
        if isinstance(outcome, RequestError):
            print(f"{name}: {outcome}", file=in_utf8(sys.stderr))
        else:
            row = ", ".join(f"{entry['label']} {entry['probability']:.1%}" for entry in self.top(outcome))
            print(f"{name}: {row}{', out of distribution' if is_ood(outcome.ood) else ''}", file=self.stream)


class JsonLines(Output):
    """An object per file: `file` with the fields of a prediction at `/predict`, or with an `error`."""

    def write(self, name: str, outcome: Outcome) -> None:
        print(json.dumps({"file": readable(name), **self._body(outcome)}), file=self.stream)

    def _body(self, outcome: Outcome) -> dict[str, Any]:
        if isinstance(outcome, RequestError):
            return {"error": {"type": TYPE + outcome.type, "title": outcome.title, "detail": str(outcome)}}
        top = self.top(outcome)
        best = {"label": top[0]["label"], "confidence": top[0]["probability"]}
        return {**best, "top": top, **ood_fields(outcome.ood), "resized_from": outcome.resized_from}


class Csv(Output):
    """Columns: file, label_1, probability_1, ..., ood_score (empty for a file without scores), error."""

    def __init__(self, stream: TextIO, classes: list[str], top_k: int) -> None:
        super().__init__(stream, classes, top_k)
        self._writer = csv.writer(self.stream, lineterminator="\n")
        columns = [f"{column}_{rank}" for rank in range(1, top_k + 1) for column in ("label", "probability")]
        self._writer.writerow(["file", *columns, "ood_score", "error"])

    def write(self, name: str, outcome: Outcome) -> None:
        if isinstance(outcome, RequestError):
            values, error = [""] * (2 * self.top_k + 1), str(outcome)
        else:
            values, error = [str(value) for entry in self.top(outcome) for value in entry.values()], ""
            values.append("" if outcome.ood is None else f"{outcome.ood:.4f}")
        self._writer.writerow([readable(name), *values, error])


FORMATS: dict[str, type[Output]] = {"text": Text, "json": JsonLines, "csv": Csv}


def readable(name: str) -> str:
    r"""The name as valid Unicode: bytes that are not UTF-8 become \xNN."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def in_utf8(stream: TextIO) -> TextIO:
    """The stream in UTF-8 whatever the locale; bytes of file names that are not UTF-8 are written as they are."""
    if isinstance(stream, TextIOWrapper):
        stream.reconfigure(encoding="utf-8", errors="surrogateescape")
    return stream
