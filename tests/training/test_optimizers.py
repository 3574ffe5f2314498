from typing import Any

import pytest
import torch
from torch import nn

from app.model.networks import MLP, ConvNet, LeNet
from training import optimizers
from training.optimizers import Muon, orthogonalize
from training.recipe import DEFAULT_RECIPES, Recipe


@pytest.mark.parametrize("shape", [(16, 72), (72, 16), (32, 32)])
def test_orthogonalized_singular_values_are_near_one(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalize(matrix, steps=5).float())
    assert values.max() < 1.5
    assert values.median() > 0.5


def test_muon_keeps_the_norm_and_lowers_the_loss() -> None:
    torch.manual_seed(0)
    start = torch.randn(8, 4, 3, 3)
    filters = torch.nn.Parameter(start * 8**0.5 / start.norm())
    target = torch.randn(8, 4, 3, 3)
    muon = Muon([filters], lr=0.1, momentum=0.6)
    losses = []
    for _ in range(50):
        muon.zero_grad()
        loss = -(filters * target).sum()
        loss.backward()
        losses.append(loss.item())
        muon.step()
    assert losses[-1] < losses[1] < losses[0]
    assert filters.norm().item() == pytest.approx(8**0.5, rel=0.2)


def test_rates_fall_to_zero_at_the_end_step() -> None:
    recipe = Recipe(whiten_bias_epochs=3)
    built = optimizers.build(ConvNet(10, (8, 8, 8)), recipe, batch_size=100, total_steps=100, steps_per_epoch=10)
    groups = [group for optimizer in built for group in optimizer.param_groups]
    optimizers.update(built, _loss(groups), step=0)
    assert all(group["lr"] == group["initial_lr"] for group in groups)
    optimizers.update(built, _loss(groups), step=30)
    assert [group["lr"] / group["initial_lr"] for group in groups] == pytest.approx([0, 0.7, 0.7, 0.7])


@pytest.mark.parametrize("network", [ConvNet(10, (8, 8, 8)), MLP(10)])
def test_adam_has_three_times_the_rate_for_non_filters(network: nn.Module) -> None:
    built = optimizers.build(
        network, Recipe(optimizer="adam", lr=0.1), batch_size=100, total_steps=100, steps_per_epoch=10
    )
    groups = [group for optimizer in built for group in optimizer.param_groups]
    optimizers.update(built, _loss(groups), step=75)
    for group in groups:
        assert group["lr"] == pytest.approx(0.025 if group["params"][0].ndim == 4 else 0.075)
    assert {id(p) for group in groups for p in group["params"]} == {
        id(p) for p in network.parameters() if p.requires_grad
    }


def test_group_can_be_frozen_from_the_start() -> None:
    built = optimizers.build(
        ConvNet(10, (8, 8, 8)), Recipe(whiten_bias_epochs=0), 100, total_steps=100, steps_per_epoch=10
    )
    groups = [group for optimizer in built for group in optimizer.param_groups]
    optimizers.update(built, _loss(groups), step=0)
    assert [group["lr"] / group["initial_lr"] for group in groups] == [0, 1, 1, 1]


def test_finished_group_needs_no_gradient() -> None:
    network = ConvNet(10, (8, 8, 8))
    built = optimizers.build(network, Recipe(whiten_bias_epochs=3), batch_size=100, total_steps=100, steps_per_epoch=10)
    optimizers.freeze_finished_groups(built, step=29)
    before = {name for name, p in network.named_parameters() if p.requires_grad}
    optimizers.freeze_finished_groups(built, step=30)
    assert before - {name for name, p in network.named_parameters() if p.requires_grad} == {"whiten.bias"}


def test_sgd_keeps_its_rate() -> None:
    built = optimizers.build(LeNet(10), DEFAULT_RECIPES["lenet"], batch_size=4, total_steps=100, steps_per_epoch=50)
    groups = [group for optimizer in built for group in optimizer.param_groups]
    optimizers.update(built, _loss(groups), step=99)
    assert [group["lr"] for group in groups] == [0.001]


def _loss(groups: list[dict[str, Any]]) -> torch.Tensor:
    """Something with a gradient for every parameter."""
    return torch.stack([p.square().sum() for group in groups for p in group["params"]]).sum()


@pytest.mark.parametrize("network", [ConvNet(10, (8, 8, 8), depth=3), LeNet(10), MLP(10)])
def test_every_trainable_parameter_has_one_optimizer(network: torch.nn.Module) -> None:
    built = optimizers.build(network, Recipe(), batch_size=100, total_steps=10, steps_per_epoch=5)
    held = [p for optimizer in built for group in optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in network.parameters() if p.requires_grad}
    assert len(held) == len({id(p) for p in held})
