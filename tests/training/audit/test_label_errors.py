"""Wrong labels are found among separable features."""

import numpy as np
import pytest

from training.audit import label_errors


def clusters(counts: dict[str, int]) -> tuple[np.ndarray, list[str]]:
    generator = np.random.default_rng(0)
    labels = [name for name, count in counts.items() for _ in range(count)]
    centres = {name: generator.normal(0, 8, 8) for name in counts}
    return np.array([centres[label] + generator.normal(0, 1, 8) for label in labels], np.float32), labels


def test_swapped_labels_are_found() -> None:
    features, labels = clusters({"cat": 40, "dog": 40, "fox": 40})
    labels[3], labels[50] = "dog", "fox"
    errors = label_errors.find(features, labels)
    assert {(error.position, error.suggested) for error in errors} == {(3, "cat"), (50, "dog")}
    assert errors[0].confidence <= errors[1].confidence < 0.2


def test_clean_labels_give_no_error() -> None:
    assert label_errors.find(*clusters({"cat": 30, "dog": 30})) == []


@pytest.mark.parametrize("counts", [{}, {"cat": 5}, {"cat": 40, "dog": 2}])
def test_too_few_pictures_give_no_error(counts: dict[str, int]) -> None:
    assert label_errors.find(*clusters(counts)) == []


def test_class_of_one_picture_is_left_out() -> None:
    features, labels = clusters({"ant": 1, "cat": 40, "dog": 40})
    labels[5] = "dog"
    assert [error.position for error in label_errors.find(features, labels)] == [5]
