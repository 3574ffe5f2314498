"""A test part for data that have none: stratified, and the same for every run."""

from collections import defaultdict

import numpy as np

from training.datasets.listing import Item, Listing, plural


def hold_out(listing: Listing, fraction: float, seed: int) -> Listing:
    """The listing with `fraction` of each class as its test part, where it has only a training part.

    Two pictures of each class stay for training and validation. With fraction 1 all pictures are test pictures.
    """
    if set(listing.parts) != {"train"} or fraction == 0:
        return listing
    items = listing.parts["train"]
    held_out = _draw(items, fraction, seed)
    if not held_out:
        return listing._replace(notes=[*listing.notes, "no test part: too few pictures to hold some out"])
    parts = {
        "train": [item for i, item in enumerate(items) if i not in held_out],
        "test": [item for i, item in enumerate(items) if i in held_out],
    }
    note = (
        f"{listing.form} without a test part: {len(held_out)} of {plural(len(items), 'picture')} are held out "
        f"for the test (--test-fraction {fraction:g}, --split-seed {seed})"
    )
    return listing._replace(
        parts={part: chosen for part, chosen in parts.items() if chosen}, notes=[*listing.notes, note]
    )


def _draw(items: list[Item], fraction: float, seed: int) -> set[int]:
    """Positions of the held-out items."""
    members: dict[str, list[int]] = defaultdict(list)
    for i, item in enumerate(items):
        members[item.label].append(i)
    generator = np.random.default_rng(seed)
    held_out: set[int] = set()
    for label in sorted(members):
        order = generator.permutation(members[label])
        count = len(order) if fraction == 1 else min(max(1, round(fraction * len(order))), max(0, len(order) - 2))
        held_out |= set(order[:count].tolist())
    return held_out
