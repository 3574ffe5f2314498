"""The same and nearly the same pictures.

Identical pictures have the same pixels at the network's input size. Near duplicates are found by perceptual hashes and
confirmed by frozen features, as in ciFAIR (Barz & Denzler 2020, arXiv 1902.00423), which has features alone and a
person's judgement.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from typing import NamedTuple

import imagehash
import numpy as np
from numpy.typing import NDArray
from PIL import Image

BITS = 128  # 64 of each hash
# With both limits 354 of CIFAR-10's test images have a partner, 220 of them in ciFAIR's list of 286. A distance of 36
# finds 441 and 235: docs/data-audit.md.
MAX_DISTANCE = 32  # of these bits
MIN_SIMILARITY = 0.98  # cosine of the features
CHUNK = 1024  # pictures that are compared with all others at once
ROWS = 32  # of them, whose candidates are listed at once
BLOCK = 16_384  # candidates whose features are compared at once: 67 MB with 512 features
MAX_PAIRS = 200_000  # kept: frames of a video are near duplicates of each other

Array = NDArray[np.float32]


class Pair(NamedTuple):
    """Positions of two pictures, differing bits of their hashes, and the cosine of their features."""

    first: int
    second: int
    distance: int
    similarity: float


def identical_groups(pixels: NDArray[np.uint8]) -> list[list[int]]:
    """Positions of pictures uint8 [N, S, S, 3] with equal pixels, in groups of two and more."""
    groups: dict[bytes, list[int]] = defaultdict(list)
    for i, image in enumerate(pixels):
        groups[blake2b(image.tobytes(), digest_size=16).digest()].append(i)
    return [group for group in groups.values() if len(group) > 1]


def perceptual_hashes(pixels: NDArray[np.uint8]) -> Array:
    """The bits of phash and dhash as -1 and 1, float32 [N, BITS]: frequencies and gradients err on other pictures."""
    rows = []
    for image in pixels:
        grey = Image.fromarray(image).convert("L")
        rows.append(np.concatenate([imagehash.phash(grey).hash.ravel(), imagehash.dhash(grey).hash.ravel()]))
    bits = np.array(rows, dtype=np.float32).reshape(len(rows), BITS)
    return 2 * bits - 1


def near_pairs(hashes: Array, features: Array, skipped: Sequence[int] = (), max_pairs: int = MAX_PAIRS) -> list[Pair]:
    """Pairs within MAX_DISTANCE and above MIN_SIMILARITY, most similar first; at most `max_pairs` of them.

    `hashes` as from `perceptual_hashes`, `features` [N, D]; `skipped` are positions that are left out, such as pictures
    of one colour, whose hashes mean nothing. Compares all with all: 60,000 pictures are 1.8 billion pairs.
    """
    units = features / np.linalg.norm(features, axis=1, keepdims=True).clip(1e-9)
    valid = np.ones(len(hashes), bool)
    valid[list(skipped)] = False
    found: list[Pair] = []
    for first, second, distances in _candidates(hashes):
        keep = valid[first] & valid[second]
        first, second, distances = first[keep], second[keep], distances[keep]
        similarities = np.einsum("nd,nd->n", units[first], units[second])
        chosen = similarities >= MIN_SIMILARITY
        columns = first[chosen], second[chosen], distances[chosen], similarities[chosen]
        found += map(Pair, *(column.tolist() for column in columns))
        if len(found) > max_pairs:
            break
    return sorted(found, key=lambda pair: -pair.similarity)[:max_pairs]


def _candidates(hashes: Array) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]]:
    """(first, second, distance) of pairs within MAX_DISTANCE, at most BLOCK at once.

    Of nearly uniform pictures all pairs are candidates: their features would not fit into memory together.
    """
    count, bits = hashes.shape
    for start in range(0, count, CHUNK):
        # The product of signs is bits - 2 x distance: a matrix product is the fastest way to count.
        products = hashes[start : start + CHUNK] @ hashes[start:].T
        for row in range(0, len(products), ROWS):
            rows, columns = np.nonzero(products[row : row + ROWS] >= bits - 2 * MAX_DISTANCE)
            rows += row
            upper = columns > rows
            rows, columns = rows[upper], columns[upper]
            distances = ((bits - products[rows, columns]) / 2).astype(np.int64)
            for i in range(0, len(rows), BLOCK):
                block = slice(i, i + BLOCK)
                yield rows[block] + start, columns[block] + start, distances[block]
