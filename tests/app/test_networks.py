import pytest
import torch
from torch.nn import functional as F

from app.model.networks import SMALL_MAP, Convolution


@pytest.mark.parametrize("size", [1, 3, 4, 5])
def test_a_convolution_and_its_gradients_are_those_of_torch_on_maps_of_any_size(size: int) -> None:
    torch.manual_seed(0)
    layer = Convolution(6, 8)
    torch.nn.init.normal_(layer.weight)
    images = torch.randn(5, 6, size, size).to(memory_format=torch.channels_last).requires_grad_()
    expected = F.conv2d(images, layer.weight, padding=1)
    got = layer(images)
    assert torch.allclose(got, expected, atol=1e-5)
    towards = torch.randn_like(expected)
    inputs = (images, layer.weight)
    for mine, theirs in zip(
        torch.autograd.grad(got, inputs, towards), torch.autograd.grad(expected, inputs, towards), strict=True
    ):
        assert torch.allclose(mine, theirs, atol=1e-4)


def test_sizes_on_both_sides_of_the_border_are_tried() -> None:
    assert 4 * 4 <= SMALL_MAP < 5 * 5
