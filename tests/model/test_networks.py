import pytest
import torch
from torch.nn import functional as F

from app.model.networks import IM2COL_MAX_PIXELS, BatchNorm, ConvNet, Convolution, fold_batchnorms, unfold_batchnorms


@pytest.mark.parametrize("size", [1, 3, 4, 5])
def test_im2col_gives_the_outputs_and_gradients_of_torch(size: int) -> None:
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


def test_sizes_below_and_above_the_im2col_limit_are_tested() -> None:
    assert 4 * 4 <= IM2COL_MAX_PIXELS < 5 * 5


def random_network(classes: int, seed: int, images: torch.Tensor) -> ConvNet:
    torch.manual_seed(seed)
    network = ConvNet(classes, (8, 16, 8), depth=3)
    network.initialize(images)
    for module in network.modules():
        if isinstance(module, Convolution):
            torch.nn.init.normal_(module.weight)
        if isinstance(module, BatchNorm):
            torch.nn.init.normal_(module.bias)
            torch.nn.init.normal_(module.running_mean)
            torch.nn.init.uniform_(module.running_var, 1, 20)
    return network


def test_unfolding_restores_the_function_of_a_folded_network() -> None:
    images = torch.randint(0, 256, (40, 32, 32, 3), dtype=torch.uint8)
    folded, network = fold_batchnorms(random_network(3, 0, images)), random_network(3, 1, images[:20])
    unfold_batchnorms(network, folded, images)
    pixels = images.permute(0, 3, 1, 2)
    with torch.no_grad():
        expected = folded(pixels)
        assert torch.allclose(network(pixels), expected, atol=1e-4 * expected.std())
        assert torch.allclose(fold_batchnorms(network)(pixels), expected, atol=1e-4 * expected.std())
    for group in network.groups:
        for conv, norm in zip(group.convs, group.norms, strict=True):
            assert float(conv.weight.detach().norm()) == pytest.approx(len(conv.weight) ** 0.5)
            assert not norm._forward_pre_hooks


def test_head_for_other_classes_is_unchanged() -> None:
    images = torch.randint(0, 256, (10, 32, 32, 3), dtype=torch.uint8)
    network = random_network(5, 1, images)
    head = network.head.weight.clone()
    unfold_batchnorms(network, fold_batchnorms(random_network(3, 0, images)), images)
    assert torch.equal(network.head.weight, head)
