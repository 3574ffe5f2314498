"""The lines before a training."""

from pathlib import Path

import torch

from training.audit import summary
from training.data import Dataset, Split


def split(*shades: int, labels: list[int]) -> Split:
    """Pictures of noise, one for each shade; equal shades are equal pictures."""
    images = [torch.randint(0, 256, (8, 8, 3), generator=torch.Generator().manual_seed(each)) for each in shades]
    return Split(torch.stack(images).to(torch.uint8), torch.tensor(labels))


def test_sound_data_have_no_line() -> None:
    data = Dataset("x", ["a", "b"], split(1, 2, labels=[0, 1]), split(3, labels=[0]), [])
    assert summary.lines(data) == []


def test_repeated_leaked_and_contradicting_pictures_are_counted() -> None:
    data = Dataset(
        "x",
        ["cat", "dog"],
        split(1, 2, 2, 3, labels=[0, 0, 0, 1]),
        split(1, 4, labels=[0, 1]),
        [(Path("a.txt"), "No picture."), (Path("b.txt"), "No picture."), (Path("c"), "The file is empty.")],
        split(3, labels=[0]),
    )
    assert summary.lines(data) == [
        "2 files rejected: No picture. (a.txt, b.txt)",
        "1 file rejected: The file is empty. (c)",
        "6 pictures occur more than once, in 3 groups",
        "1 test picture identical to a training picture",
        "1 validation picture identical to a training picture",
        "1 picture under two labels, such as cat and dog",
    ]


def test_dark_pictures_are_counted() -> None:
    train = Split(torch.zeros(2, 8, 8, 3, dtype=torch.uint8), torch.tensor([0, 1]))
    train.images[1] = 200
    empty = Split(torch.empty(0, 8, 8, 3, dtype=torch.uint8), torch.empty(0, dtype=torch.int64))
    assert summary.lines(Dataset("x", ["a", "b"], train, empty, [])) == ["1 picture nearly black, 1 picture one colour"]
