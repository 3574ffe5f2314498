"""The cheap findings on a data set in memory, in a few lines before a training."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from training.audit.duplicates import identical_groups
from training.audit.inspection import empty_kinds
from training.data import Dataset
from training.datasets.listing import plural, shortened


def lines(dataset: Dataset) -> list[str]:
    """Rejected files by reason, identical pictures within and across parts and under two labels, empty pictures."""
    parts = {"training": dataset.train, "validation": dataset.val, "test": dataset.test}
    filled = {name: split for name, split in parts.items() if split}
    pixels = np.concatenate([split.images.numpy() for split in filled.values()])
    labels = np.concatenate([split.labels.numpy() for split in filled.values()])
    of_part = np.repeat(list(filled), [len(split) for split in filled.values()])
    found = _rejected(dataset.rejected) + _identical(identical_groups(pixels), of_part, labels, dataset.classes)
    if empty := Counter(empty_kinds(pixels).values()):
        found.append(", ".join(f"{plural(count, 'picture')} {kind}" for kind, count in empty.items()))
    return found


def _rejected(rejected: Sequence[tuple[Path, str]]) -> list[str]:
    reasons: dict[str, list[str]] = defaultdict(list)
    for path, reason in rejected:
        reasons[reason].append(path.name)
    return [
        f"{plural(len(names), 'file')} rejected: {reason} ({shortened(names, 3)})"
        for reason, names in sorted(reasons.items(), key=lambda pair: -len(pair[1]))
    ]


def _identical(
    groups: list[list[int]], parts: NDArray[np.str_], labels: NDArray[np.int64], classes: list[str]
) -> list[str]:
    """One line each for repeated pictures, for those in training and a held-out part, and for two labels."""
    found = []
    if groups:
        found.append(f"{sum(map(len, groups))} pictures occur more than once, in {plural(len(groups), 'group')}")
    leaked = Counter(
        str(parts[i]) for group in groups if "training" in parts[group] for i in group if parts[i] != "training"
    )
    found += [f"{plural(count, f'{part} picture')} identical to a training picture" for part, count in leaked.items()]
    if conflicts := [group for group in groups if len(set(labels[group].tolist())) > 1]:
        example = " and ".join(sorted({classes[label] for label in labels[conflicts[0]].tolist()})[:2])
        found.append(f"{plural(len(conflicts), 'picture')} under two labels, such as {example}")
    return found
