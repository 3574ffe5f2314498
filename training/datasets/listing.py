"""What a data set holds before any picture is decoded."""

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from numpy.typing import NDArray
from PIL import Image

from app.errors import DataError

# A file, the bytes of a file, pixels [H, W] or [H, W, 1, 3 or 4], or a function that decodes the picture.
Source = Path | bytes | NDArray[Any] | Callable[[], Image.Image]

PARTS = {
    "train": ("train", "training", "training_set", "train_set", "trainset"),
    "val": ("val", "valid", "validation", "val_set", "valid_set", "validation_set", "dev"),
    "test": ("test", "testing", "test_set", "testset"),
}

INTEGER = re.compile(r"\d{1,9}")


class Item(NamedTuple):
    """A picture and the name of its class. `name` is for reports: a path below the data folder, or `train[17]`."""

    name: str
    source: Source
    label: str


class Listing(NamedTuple):
    """Pictures by part: train, val, test, each only where the data set has it. `notes` are lines for a person."""

    name: str
    form: str
    parts: dict[str, list[Item]]
    classes: list[str]
    notes: list[str]


def part_name(text: str) -> str | None:
    """train, val or test for a folder, column or file name in use for it, else None."""
    lowered = text.strip().lower().replace("-", "_").replace(" ", "_")
    return next((part for part, names in PARTS.items() if lowered in names), None)


def sorted_classes(labels: Iterable[str]) -> list[str]:
    """The different labels in order: by value where all are integers (2 before 10), else as text."""
    distinct = set(labels)
    numbers = all(INTEGER.fullmatch(label) for label in distinct)
    return sorted(distinct, key=lambda label: (int(label), label) if numbers else (0, label))


def make_listing(
    name: str, form: str, parts: dict[str, list[Item]], names: list[str] | None = None, notes: Iterable[str] = ()
) -> Listing:
    """A listing with the classes of its training part, or of all parts without one.

    Classes keep the order of `names`; a name without a picture is left out and noted. Raises DataError for one class,
    or for a class that the training part lacks.
    """
    parts = {part: parts[part] for part in PARTS if parts.get(part)}
    present = {part: {item.label for item in items} for part, items in parts.items()}
    used = present.get("train") or set[str]().union(*present.values())
    for part, labels in present.items():
        if unknown := sorted_classes(labels - used):
            raise DataError(f"{name}: the {part} part has classes that the train part lacks: {shortened(unknown)}.")
    classes = [each for each in names if each in used] if names is not None else sorted_classes(used)
    lines = list(notes)
    if names is not None and (absent := [each for each in names if each not in used]):
        lines.append(f"{plural(len(absent), 'class', 'classes')} without pictures left out: {shortened(absent)}")
    if len(classes) < 2:
        found = f"one class, {classes[0]}" if classes else "no pictures"
        raise DataError(f"{name} ({form}) has {found}; at least two classes are needed.")
    return Listing(name, form, parts, classes, lines)


def shortened(names: Iterable[str], limit: int = 5) -> str:
    """`a, b, c` with at most `limit` names of at most 60 characters: messages are one line."""
    every = [name if len(name) <= 60 else name[:59] + "…" for name in names]
    rest = len(every) - limit
    return ", ".join(every[:limit]) + (f" and {rest} more" if rest > 0 else "")


def plural(count: int, singular: str, many: str | None = None) -> str:
    return f"{count} {singular if count == 1 else many or singular + 's'}"
