"""The hardest images of a batch."""

import torch

from app.model.networks import ConvNet
from training.distributed import Ranks
from training.recipe import Recipe
from training.selector import UPDATE_EVERY, Selector


def _selector(keep: float) -> Selector:
    torch.manual_seed(0)
    network = ConvNet(2, (8, 8, 8))
    return Selector(network, Recipe(keep=keep), batch_size=20, total=100, device=torch.device("cpu"), ranks=Ranks())


def _batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Dark images of class 0 and bright ones of class 1, the first of which has the wrong label."""
    shades = torch.tensor([40, 200]).repeat(20)
    noise = torch.randint(-30, 31, (40, 3, 32, 32), generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 1]).repeat(20)
    labels[0] = 1
    return (shades[:, None, None, None] + noise).to(torch.uint8), labels


def test_it_keeps_what_it_gets_wrong() -> None:
    selector, (images, labels) = _selector(keep=0.25), _batch()
    kept = [selector(images, labels, step).tolist() for step in range(40)]
    assert all(len(set(places)) == 10 for places in kept)
    assert 0 in kept[-1]


def test_it_learns_at_every_fourth_step_only() -> None:
    selector, (images, labels) = _selector(keep=0.5), _batch()
    weight = selector.network.head.weight
    seen = []
    for step in range(2 * UPDATE_EVERY):
        before = weight.clone()
        selector(images, labels, step)
        seen.append(not torch.equal(before, weight))
    assert seen == [step % UPDATE_EVERY == 0 for step in range(2 * UPDATE_EVERY)]
