"""All findings of an audit, as data."""

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from app.errors import DataError
from training.audit import duplicates, inspection, label_errors
from training.audit.duplicates import Pair
from training.audit.inspection import Inspection, Picture
from training.audit.label_errors import LabelError
from training.datasets.listing import Listing

Embed = Callable[[NDArray[np.uint8]], NDArray[np.float32]]

MAX_NAMES = 100  # of unreadable files of one reason, in the JSON


class Findings(NamedTuple):
    """Positions refer to `inspection.pictures`. `empty` has what a picture is instead of a motif."""

    listing: Listing
    inspection: Inspection
    identical: list[list[int]]
    near: list[Pair]
    empty: dict[int, str]
    label_errors: list[LabelError]

    def picture(self, index: int) -> Picture:
        return self.inspection.pictures[index]

    def across(self, pairs: Sequence[tuple[int, int]]) -> dict[str, int]:
        """Held-out pictures with a partner in the training part, by part."""
        leaked: dict[str, set[int]] = defaultdict(set)
        for pair in pairs:
            parts = {self.picture(i).part for i in pair}
            if "train" in parts and len(parts) == 2:
                (held_out,) = (i for i in pair if self.picture(i).part != "train")
                leaked[self.picture(held_out).part].add(held_out)
        return {part: len(found) for part, found in sorted(leaked.items())}

    def identical_pairs(self) -> list[tuple[int, int]]:
        """Every picture of a group with the first, and with the first training picture."""
        pairs = set[tuple[int, int]]()
        for group in self.identical:
            anchors = [group[0], *(i for i in group if self.picture(i).part == "train")][:2]
            pairs |= {(min(a, i), max(a, i)) for a in anchors for i in group if i != a}
        return sorted(pairs)

    def near_pairs(self) -> list[tuple[int, int]]:
        return [(pair.first, pair.second) for pair in self.near]

    def near_is_cut(self) -> bool:
        """Whether the list of near duplicates has ended at its limit, so that there may be others."""
        return len(self.near) >= duplicates.MAX_PAIRS

    def conflicts(self) -> list[tuple[int, int]]:
        """Identical and near pairs under two labels."""
        pairs = [*self.identical_pairs(), *self.near_pairs()]
        return [pair for pair in pairs if self.picture(pair[0]).label != self.picture(pair[1]).label]


def audit(listing: Listing, size: int, embed: Embed) -> Findings:
    """Reads and compares every picture of the listing; `embed` gives features for pixels uint8 [N, size, size, 3].

    Raises DataError where none is readable.
    """
    seen = inspection.inspect(listing, size)
    if not seen.pictures:
        raise DataError(f"{listing.name} has no readable picture; the first file was rejected: {seen.rejected[0][1]}")
    identical = duplicates.identical_groups(seen.pixels)
    empty = inspection.empty_kinds(seen.pixels)
    features = embed(seen.pixels)
    repeated = [i for group in identical for i in group[1:]]  # one of each group is enough
    near = duplicates.near_pairs(duplicates.perceptual_hashes(seen.pixels), features, [*empty, *repeated])
    errors = label_errors.find(features, seen.labels)
    return Findings(listing, seen, identical, near, empty, errors)


def class_counts(findings: Findings) -> dict[str, dict[str, int]]:
    """Readable pictures of each class, by part."""
    counted = Counter((picture.part, picture.label) for picture in findings.inspection.pictures)
    return {part: {name: counted[part, name] for name in findings.listing.classes} for part in findings.listing.parts}


def unreadable(findings: Findings) -> dict[str, list[str]]:
    """Names of unreadable files by reason, most frequent reason first."""
    reasons: dict[str, list[str]] = defaultdict(list)
    for picture, reason in findings.inspection.rejected:
        reasons[reason].append(picture.name)
    return dict(sorted(reasons.items(), key=lambda pair: -len(pair[1])))


def size_summary(findings: Findings) -> dict[str, Any]:
    """Smallest, median and largest side, and the most common sizes."""
    sizes = findings.inspection.sizes
    if not sizes:
        return {}
    sides = np.array(sizes)
    common = [f"{w} x {h}: {count}" for (w, h), count in Counter(sizes).most_common(3)]
    return {
        "smallest": sides.min(0).tolist(),
        "median": np.median(sides, axis=0).astype(int).tolist(),
        "largest": sides.max(0).tolist(),
        "different": len(set(sizes)),
        "common": common,
    }


def as_json(findings: Findings) -> dict[str, Any]:
    def shown(index: int) -> dict[str, str]:
        return findings.picture(index)._asdict()

    return {
        "name": findings.listing.name,
        "form": findings.listing.form,
        "notes": list(findings.listing.notes),
        "classes": class_counts(findings),
        "sizes": size_summary(findings),
        "unreadable": {
            reason: {"count": len(names), "files": names[:MAX_NAMES]} for reason, names in unreadable(findings).items()
        },
        "identical": {
            "leaked": findings.across(findings.identical_pairs()),
            "groups": [[shown(i) for i in group] for group in findings.identical],
        },
        "near_duplicates": {
            "leaked": findings.across(findings.near_pairs()),
            "cut": findings.near_is_cut(),
            "pairs": [
                {
                    "pictures": [shown(p.first), shown(p.second)],
                    "distance": p.distance,
                    "similarity": round(p.similarity, 4),
                }
                for p in findings.near
            ],
        },
        "two_labels": [[shown(a), shown(b)] for a, b in findings.conflicts()],
        "empty": [{**shown(i), "kind": kind} for i, kind in findings.empty.items()],
        "label_errors": [
            {**shown(e.position), "suggested": e.suggested, "confidence_of_label": round(e.confidence, 4)}
            for e in findings.label_errors
        ],
    }
