import pytest
import torch

from app.model.networks import ConvNet, LeNet, fold_batchnorms
from training import calibration


def test_a_few_large_inputs_do_not_make_the_steps_coarse_for_all() -> None:
    chance = torch.Generator().manual_seed(0)
    inputs = torch.rand(1_000_000, generator=chance)
    assert calibration.best_range(inputs) == inputs.max()
    inputs[0] = 8.0
    assert 1 < calibration.best_range(inputs) < 5


@pytest.mark.parametrize("value", [0.0, -0.1])
def test_inputs_that_are_never_above_0_have_a_range_all_the_same(value: float) -> None:
    assert 0 < calibration.best_range(torch.full((100,), value)) < 0.2


def test_each_convolution_of_the_groups_has_a_range_of_what_it_gets() -> None:
    torch.manual_seed(0)
    network, images = ConvNet(3, (8, 8)), torch.randint(0, 256, (70, 32, 32, 3), dtype=torch.uint8)
    network.initialize(images)
    folded = fold_batchnorms(network)
    ranges = calibration.input_ranges(folded, images)
    assert ranges.keys() == {f"groups.{group}.convs.{i}" for group in range(2) for i in range(2)}
    with torch.inference_mode():
        first = torch.nn.functional.gelu(folded.whiten(images.permute(0, 3, 1, 2).float())).max().item()
    assert 0.1 * first < ranges["groups.0.convs.0"] <= first
    assert calibration.input_ranges(LeNet(3), images) == {}
