"""Identical and near-duplicate pictures are found, and others are not."""

import tracemalloc

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance

from tests.conftest import EXAMPLES
from training.audit import duplicates
from training.audit.duplicates import identical_groups, near_pairs, perceptual_hashes

Pixels = np.ndarray


def variants() -> Pixels:
    """Two different pictures, and the first one brighter, compressed, and shifted by a pixel; uint8 [5, 32, 32, 3]."""
    cat, other = (Image.open(path).convert("RGB") for path in sorted(EXAMPLES.glob("*.png"))[:2])
    brighter = ImageEnhance.Brightness(cat).enhance(1.15)
    softer = cat.resize((24, 24), Image.Resampling.BICUBIC).resize((32, 32), Image.Resampling.BICUBIC)
    return np.stack([np.asarray(each) for each in (cat, other, brighter, softer)])


def colours(pixels: Pixels) -> np.ndarray:
    """Mean colours of 4 x 4 blocks as features, without their mean over the picture: similar for similar pictures."""
    blocks = pixels.astype(np.float32).reshape(len(pixels), 8, 4, 8, 4, 3).mean((2, 4)).reshape(len(pixels), -1)
    return blocks - blocks.mean(1, keepdims=True)


@settings(deadline=None)
@given(st.lists(st.integers(0, 3), max_size=30))
def test_identical_pictures_are_grouped(kinds: list[int]) -> None:
    pixels = np.array([np.full((4, 4, 3), kind, np.uint8) for kind in kinds]).reshape(-1, 4, 4, 3)
    groups = identical_groups(pixels)
    expected = [[i for i, each in enumerate(kinds) if each == kind] for kind in dict.fromkeys(kinds)]
    assert groups == [group for group in expected if len(group) > 1]


def test_changed_copies_are_near_and_others_are_not() -> None:
    pixels = variants()
    pairs = near_pairs(perceptual_hashes(pixels), colours(pixels))
    assert {(pair.first, pair.second) for pair in pairs} == {(0, 2), (0, 3), (2, 3)}
    assert all(pair.distance <= duplicates.MAX_DISTANCE and pair.similarity > 0.98 for pair in pairs)
    assert [pair.similarity for pair in pairs] == sorted((pair.similarity for pair in pairs), reverse=True)


def test_skipped_pictures_have_no_pairs() -> None:
    pixels = variants()
    pairs = near_pairs(perceptual_hashes(pixels), colours(pixels), skipped=[0])
    assert {(pair.first, pair.second) for pair in pairs} == {(2, 3)}


def test_distance_is_the_number_of_differing_bits() -> None:
    hashes = np.ones((3, 128), np.float32)
    hashes[1, :7] = -1
    hashes[2, :40] = -1  # beyond the limit to the first, 33 from the second
    pairs = near_pairs(hashes, np.ones((3, 2), np.float32))
    assert [(pair.first, pair.second, pair.distance) for pair in pairs] == [(0, 1, 7)]


def test_features_must_agree_with_the_hashes() -> None:
    hashes = np.ones((2, 128), np.float32)
    assert near_pairs(hashes, np.eye(2, dtype=np.float32)) == []


def test_pictures_of_different_chunks_are_compared() -> None:
    count = duplicates.CHUNK + 5
    generator = np.random.default_rng(0)
    hashes = np.where(generator.random((count, 128)) < 0.5, -1, 1).astype(np.float32)
    hashes[count - 1] = hashes[0]
    pairs = near_pairs(hashes, np.ones((count, 2), np.float32))
    assert (0, count - 1) in {(pair.first, pair.second) for pair in pairs}


def test_pairs_of_uniform_pictures_are_cut_in_little_memory() -> None:
    hashes, features = np.ones((2500, 128), np.float32), np.ones((2500, 512), np.float32)
    tracemalloc.start()
    pairs = near_pairs(hashes, features, max_pairs=20_000)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(pairs) == 20_000
    assert len({(pair.first, pair.second) for pair in pairs}) == 20_000
    assert peak < 150e6  # features of all 3 million pairs are 13 GB


def test_no_picture_gives_no_pair() -> None:
    nothing = perceptual_hashes(np.empty((0, 32, 32, 3), np.uint8))
    assert near_pairs(nothing, np.empty((0, 4), np.float32)) == []
