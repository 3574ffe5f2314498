"""Every picture of a data set, decoded once at the input size of the network."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from training.datasets import pictures
from training.datasets.listing import Item, Listing

UNIFORM_STD = 3.0  # of 255, over all pixels and colours: below it a picture shows nothing
BLACK_MEAN = 12.0  # of 255; a 12-bit picture in a file of 16 bits has at most 15

Pixels = NDArray[np.uint8]


class Picture(NamedTuple):
    """Where a picture is in the data set. `name` is a path below the data folder, or `train[17]`."""

    part: str
    name: str
    label: str


class Inspection(NamedTuple):
    """Readable pictures with pixels uint8 [N, S, S, 3] and sizes (width, height); the others with a reason."""

    pictures: list[Picture]
    pixels: Pixels
    sizes: list[tuple[int, int]]
    rejected: list[tuple[Picture, str]]

    @property
    def labels(self) -> list[str]:
        return [picture.label for picture in self.pictures]


def inspect(listing: Listing, size: int) -> Inspection:
    """Decodes every picture of the listing to size x size pixels."""
    found, rejected, pixels, sizes = (
        list[Picture](),
        list[tuple[Picture, str]](),
        list[Pixels](),
        list[tuple[int, int]](),
    )
    items = [(part, item) for part, each in listing.parts.items() for item in each]
    with ThreadPoolExecutor() as pool:  # Pillow releases the interpreter's lock while it decodes
        results = pool.map(lambda pair: _decode(pair[1], size), items)
        for (part, item), (decoded, native) in zip(items, _progress(results, len(items)), strict=True):
            picture = Picture(part, item.name, item.label)
            if isinstance(decoded, str):
                rejected.append((picture, decoded))
            else:
                found.append(picture)
                pixels.append(decoded)
                sizes.append(native)
    stacked = np.stack(pixels) if pixels else np.empty((0, size, size, 3), np.uint8)
    return Inspection(found, stacked, sizes, rejected)


def _progress(
    results: Iterator[tuple[Pixels | str, tuple[int, int]]], count: int
) -> Iterator[tuple[Pixels | str, tuple[int, int]]]:
    # Standard error, and only on a terminal.
    return iter(tqdm(results, "reading", count, leave=False, disable=None))


def _decode(item: Item, size: int) -> tuple[Pixels | str, tuple[int, int]]:
    source = item.source
    if isinstance(source, Path):
        try:
            source = source.read_bytes()  # once, for pixels and header
        except OSError as error:
            return f"{error.strerror}.", (0, 0)
    decoded = pictures.read(source, size)
    return decoded, (0, 0) if isinstance(decoded, str) else pictures.native_size(source) or (0, 0)


def empty_kinds(pixels: Pixels) -> dict[int, str]:
    """Positions of pictures uint8 [N, S, S, 3] that show nothing: `black` or `one colour`."""
    flat = pixels.reshape(len(pixels), -1)
    found = {}
    for i, row in enumerate(flat):  # a picture at a time: float32 copies of all would take four times the memory
        if row.mean() < BLACK_MEAN:
            found[i] = "nearly black"
        elif row.std() < UNIFORM_STD:
            found[i] = "one colour"
    return found
