import pytest
import torch
from torch import Tensor

from app.model import tta
from training import metrics
from training.data import Split


def look(images: Tensor) -> Tensor:
    """An answer that depends on one pixel off the centre, so that every view gives another one."""
    pixel = images[:, 1, 2].float() / 64
    return pixel.softmax(1)


def logits(images: Tensor, row: int, column: int) -> Tensor:
    return images[:, row, column].float() / 64


@pytest.fixture
def images() -> Tensor:
    return torch.randint(0, 256, (20, 8, 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_views_average_logits_with_the_papers_weights(images: Tensor) -> None:
    mirrored = logits(images, 1, 5)
    plain = logits(images, 1, 2)
    moved_up_left = logits(images, 2, 3), logits(images, 2, 6)
    moved_down_right = logits(images, 0, 1), logits(images, 0, 4)
    six = 0.25 * (plain + mirrored) + 0.125 * (sum(moved_up_left) + sum(moved_down_right))
    for view, expected in ((metrics.one, plain), (metrics.two, (plain + mirrored) / 2), (metrics.six, six)):
        torch.testing.assert_close(view(look, images).softmax(1), expected.softmax(1))


def test_a_probability_of_zero_does_not_silence_the_other_view(images: Tensor) -> None:
    averaged = metrics.two(lambda pixels: torch.tensor([[0.0, 1.0]]).expand(len(pixels), 2), images).softmax(1)
    assert torch.isfinite(averaged).all()


def test_only_what_is_in_doubt_is_looked_at_again(images: Tensor) -> None:
    once, twice = look(images), metrics.two(look, images).softmax(1)
    unsure = once.max(1).values < tta.DEFAULT_THRESHOLD
    assert unsure.any()
    assert not unsure.all()
    torch.testing.assert_close(metrics.doubtful(look, images, once), torch.where(unsure[:, None], twice, once))


def test_readings_tell_what_each_look_brings(images: Tensor) -> None:
    split = Split(images, look(images).argmax(1))
    first = metrics.take("one view", look(split.images), split.labels)
    rows = [first, *metrics.of_views(look, split), *metrics.of_formats(look, split)]
    assert first.accuracy == 1
    assert all(row.interval_95[0] <= row.accuracy <= row.interval_95[1] + 1e-9 for row in rows)
    table = metrics.table(rows).splitlines()
    assert len(table) == 2 + 9
    assert "JPEG of quality 50, one view" in table[7]
    assert "| +0.00 points |" in table[2]
