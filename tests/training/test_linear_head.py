"""The linear head: separable classes are learnt, flips that matter are found, rare classes are predicted."""

import numpy as np
import pytest

from training import linear_head
from training.features import Array, Views


def views(images: Array, flips: Array) -> Views:
    return Views(images, flips, images, flips)


def clusters(counts: list[int], width: int = 12, distance: float = 3.0) -> tuple[Array, linear_head.Labels]:
    """Positive features [N, width] around a random centre for each class, and labels."""
    generator = np.random.default_rng(0)
    labels = np.repeat(np.arange(len(counts)), counts)
    centres = generator.uniform(0, distance, (len(counts), width))
    return (centres[labels] + generator.uniform(0, 1, (len(labels), width))).astype(np.float32), labels


@pytest.mark.slow
@pytest.mark.parametrize("classes", [2, 5])
def test_separable_classes_are_learnt(classes: int) -> None:
    images, labels = clusters([12] * classes)
    head = linear_head.fit(views(images, images), labels, classes, False, None, 0, seed=0)
    assert head.hflip
    assert head.weight.shape == (classes, 12)
    assert (images @ head.weight.T).argmax(1).tolist() == labels.tolist()
    assert linear_head.balanced_accuracy(head.log_probabilities(), labels) > 0.95
    np.testing.assert_allclose(np.exp(head.mean).sum(1), 1, rtol=1e-5)


def test_flips_that_change_the_class_are_off() -> None:
    images, labels = clusters([30, 30])
    mirrored = np.concatenate([images[30:], images[:30]])
    head = linear_head.fit(views(images, mirrored), labels, 2, False, None, 0, seed=0)
    assert not head.hflip
    assert head.flip_loss > 0.9
    assert np.array_equal(head.log_probabilities(), head.single)
    assert linear_head.fit(views(images, mirrored), labels, 2, False, True, 0, seed=0).hflip


def test_balanced_head_predicts_a_rare_class() -> None:
    images, labels = clusters([400, 8], distance=0.8)
    plain, balanced = (
        linear_head.fit(views(images, images), labels, 2, balanced, True, 0.001, seed=0) for balanced in (False, True)
    )
    recall = [(head.mean[labels == 1].argmax(1) == 1).mean() for head in (plain, balanced)]
    assert recall[0] < 0.5 < recall[1]


def test_log_probabilities_are_out_of_fold() -> None:
    generator = np.random.default_rng(0)
    images = generator.uniform(0, 1, (60, 200)).astype(np.float32)
    labels = np.arange(60) % 2  # random features: only a head that has seen an image classifies it
    head = linear_head.fit(views(images, images), labels, 2, False, True, 1.0, seed=0)
    assert (images @ head.weight.T).argmax(1).tolist() == labels.tolist()
    assert linear_head.balanced_accuracy(head.mean, labels) < 0.75


def test_start_does_not_depend_on_validation_labels() -> None:
    images, labels = clusters([20, 20])
    held_out = np.arange(40) % 4 == 0
    changed = np.where(held_out, 1 - labels, labels)
    one, other = (
        linear_head.fit(views(images, images), each, 2, False, False, 0.1, 0, held_out) for each in (labels, changed)
    )
    np.testing.assert_array_equal(one.start_weight, other.start_weight)
    assert not np.allclose(one.weight, other.weight)
