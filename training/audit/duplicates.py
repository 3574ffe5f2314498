"""The same and nearly the same pictures.

Identical pictures have the same pixels at the network's input size. Near duplicates are found by perceptual hashes and
confirmed by frozen features, as in ciFAIR (Barz & Denzler 2020, arXiv 1902.00423), which has features alone and a
person's judgement.
"""

from collections import defaultdict
from collections.abc import Sequence
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


def near_pairs(hashes: Array, features: Array, skipped: Sequence[int] = ()) -> list[Pair]:
    """Pairs within MAX_DISTANCE and above MIN_SIMILARITY, most similar first; at most MAX_PAIRS.

    `hashes` as from `perceptual_hashes`, `features` [N, D]; `skipped` are positions that are left out, such as pictures
    of one colour, whose hashes mean nothing. Compares all with all: 60,000 pictures are 1.8 billion pairs.
    """
    count, bits = hashes.shape
    units = features / np.linalg.norm(features, axis=1, keepdims=True).clip(1e-9)
    valid = np.ones(count, bool)
    valid[list(skipped)] = False
    found: list[Pair] = []
    for start in range(0, count, CHUNK):
        # The product of signs is bits - 2 x distance: a matrix product is the fastest way to count.
        products = hashes[start : start + CHUNK] @ hashes[start:].T
        rows, columns = np.nonzero(products >= bits - 2 * MAX_DISTANCE)
        first, second = rows + start, columns + start
        keep = (second > first) & valid[first] & valid[second]
        first, second, distances = first[keep], second[keep], (bits - products[rows[keep], columns[keep]]) / 2
        similarities = np.einsum("nd,nd->n", units[first], units[second])
        chosen = similarities >= MIN_SIMILARITY
        found += map(
            Pair,
            first[chosen].tolist(),
            second[chosen].tolist(),
            distances[chosen].astype(int).tolist(),
            similarities[chosen].tolist(),
        )
        if len(found) > MAX_PAIRS:
            break
    return sorted(found, key=lambda pair: -pair.similarity)[:MAX_PAIRS]
