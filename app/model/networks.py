"""The networks that a weights file can name: uint8 images to logits, with the normalisation inside.

Training uses a network as `build` returns it. Files and engines hold it as `fold_batchnorms` returns it.
"""

import copy
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

IM2COL_MAX_PIXELS = 16  # up to this map size a convolution trains as one matrix product
WHITENING_KERNEL = 2  # pixels; patches of 2 x 2 x 3 colours have 12 principal directions


class Normalize(nn.Module):
    """Maps pixel values 0..255 to zero mean and unit variance per channel."""

    mean: Tensor
    std: Tensor

    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(1, channels, 1, 1))
        self.register_buffer("std", torch.ones(1, channels, 1, 1))

    def forward(self, pixels: Tensor) -> Tensor:
        return (pixels - self.mean) / self.std


class BatchNorm(nn.BatchNorm2d):
    """Batch normalisation with a fixed scale of 1: the next convolution can learn the scale."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-5, momentum=0.4)  # an epoch has few steps, so statistics adapt fast
        self.weight.requires_grad = False


class Convolution(nn.Conv2d):
    """A 3x3 convolution whose first filters start as the identity (Zagoruyko & Komodakis 2017, arXiv 1706.00388).

    In training, small maps use im2col and one matrix product: oneDNN's weight gradient takes five times as long there
    (384 channels on 3 x 3 pixels, 1,000 images, two cores with AMX).
    """

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__(channels_in, channels_out, 3, padding=1, bias=False)
        nn.init.dirac_(self.weight.data[:channels_in])

    def forward(self, x: Tensor) -> Tensor:
        trains = torch.is_grad_enabled() and self.bias is None  # folded convolutions have a bias
        if trains and x.device.type == "cpu" and x.shape[2] * x.shape[3] <= IM2COL_MAX_PIXELS:
            return F.linear(_im2col(x), self.weight.permute(0, 2, 3, 1).flatten(1)).permute(0, 3, 1, 2)
        return super().forward(x)


def _im2col(x: Tensor) -> Tensor:
    """Input patch of each output of a 3x3 convolution: [N, C, H, W] to [N, H, W, 9 C], row-major within a patch."""
    height, width = x.shape[2:]
    padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))
    return torch.cat([padded[:, i : i + height, j : j + width] for i in range(3) for j in range(3)], 3)


class ConvGroup(nn.Module):
    """Convolution, 2x2 max pooling, then `depth - 1` convolutions, with a skip around them for depth 3 and more."""

    def __init__(self, channels_in: int, channels_out: int, depth: int) -> None:
        super().__init__()
        widths = [channels_in] + [channels_out] * depth
        self.convs = nn.ModuleList(Convolution(i, o) for i, o in pairwise(widths))
        self.norms = nn.ModuleList(BatchNorm(channels_out) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.norms[0](F.max_pool2d(self.convs[0](x), 2)))
        skip, last = x, len(self.convs) - 1
        for i in range(1, last + 1):
            x = self.norms[i](self.convs[i](x))
            x = F.gelu(x + skip if i == last and last > 1 else x)
        return x


class ConvNet(nn.Module):
    """Patch whitening, groups of 3x3 convolutions, global max pooling, a linear head (Jordan 2024, arXiv 2404.00498).

    uint8 images [N, 3, H, W], with three groups of at least 12 x 12 pixels, to float32 logits [N, classes].
    Twin of `app.engines.openvino.build_model`, which repeats `forward` without torch; a property test compares them.
    """

    def __init__(self, classes: int, widths: Sequence[int] = (64, 256, 256), depth: int = 2) -> None:
        super().__init__()
        patch = 3 * WHITENING_KERNEL**2
        self.normalize: nn.Module = Normalize()
        self.whiten = nn.Conv2d(3, 2 * patch, WHITENING_KERNEL)  # `initialize` sets the weights; they stay fixed
        self.whiten.weight.requires_grad = False
        channels = [2 * patch, *widths]
        self.groups = nn.Sequential(*(ConvGroup(i, o, depth) for i, o in pairwise(channels)))
        self.head = nn.Linear(widths[-1], classes, bias=False)
        nn.init.normal_(self.head.weight)

    @torch.no_grad()
    def initialize(self, images: Tensor) -> None:
        """Fits normalisation and whitening to a sample of the training images, uint8 [N, H, W, 3].

        The whitening filters are the principal components of the image patches, scaled to unit variance, and their
        negatives (Jordan 2024, section 3.2).
        """
        assert isinstance(self.normalize, Normalize)
        colours = images.reshape(-1, 3).float()
        self.normalize.mean.copy_(colours.mean(0).view(1, 3, 1, 1))
        self.normalize.std.copy_(colours.std(0).clamp(min=1).view(1, 3, 1, 1))
        k = WHITENING_KERNEL
        patches = self.normalize(images.permute(0, 3, 1, 2).float()).unfold(2, k, 1).unfold(3, k, 1)
        flat = patches.permute(0, 2, 3, 1, 4, 5).reshape(-1, 3 * k * k)
        variances, directions = torch.linalg.eigh(flat.T @ flat / len(flat))
        filters = (directions.T / (variances[:, None] + 5e-4).sqrt()).view(-1, 3, k, k)
        self.whiten.weight.copy_(torch.cat((filters, -filters)))

    def features(self, images: Tensor) -> Tensor:
        """The head's inputs [N, widths[-1]]: the largest activation of each channel."""
        pixels = self.normalize(images.to(self.whiten.weight.dtype))
        x: Tensor = self.groups(F.gelu(self.whiten(pixels)))
        return x.amax((2, 3))

    def forward(self, images: Tensor) -> Tensor:
        x = self.features(images)
        logits: Tensor = self.head(x)
        return logits.float() / x.shape[1]  # head weights have unit variance; this keeps logits small


class LeNet(nn.Module):
    """Two convolutions and three linear layers on pixels in [0, 1] (after LeCun et al. 1998), for 32 x 32 images."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 6, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2)
        )
        self.head = nn.Sequential(
            nn.Flatten(), nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, classes)
        )

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.features(_to_unit(images, self)))
        return logits.float()


class MLP(nn.Module):
    """Three linear layers with sigmoids, on the image reduced to 4 x 4 pixels; 1,046 weights for 10 classes."""

    def __init__(self, classes: int, hidden: int = 14) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(48, hidden), nn.Sigmoid(), nn.Linear(hidden, hidden), nn.Sigmoid(), nn.Linear(hidden, classes)
        )

    def forward(self, images: Tensor) -> Tensor:
        reduced = F.adaptive_avg_pool2d(_to_unit(images, self), 4)
        logits: Tensor = self.layers(reduced.flatten(1))
        return logits.float()


def _to_unit(images: Tensor, network: nn.Module) -> Tensor:
    """Pixel values 0..255 to [0, 1], in the dtype of the network's parameters."""
    return images.to(next(network.parameters()).dtype) / 255


ARCHITECTURES: dict[str, type[nn.Module]] = {"convnet": ConvNet, "lenet": LeNet, "mlp": MLP}


def build(architecture: str, arguments: dict[str, Any]) -> nn.Module:
    """A newly initialised network; raises KeyError for an unknown architecture, TypeError for unknown arguments."""
    return ARCHITECTURES[architecture](**arguments)


@torch.no_grad()
def fold_batchnorms(network: nn.Module) -> nn.Module:
    """A copy in evaluation mode, with a ConvNet's normalisations folded into the adjacent convolutions.

    A batch norm has a positive scale, so it commutes with the max pooling before it. The whitening has no padding, so
    the pixel mean moves into its bias. Other architectures have nothing to fold.
    """
    network = copy.deepcopy(network).eval()
    if not isinstance(network, ConvNet):
        return network
    assert isinstance(network.normalize, Normalize)
    whiten, mean, std = network.whiten, network.normalize.mean, network.normalize.std
    assert whiten.bias is not None
    whiten.weight.div_(std)
    whiten.bias.sub_((whiten.weight * mean).sum((1, 2, 3)))
    network.normalize = nn.Identity()
    for group in network.groups:
        assert isinstance(group, ConvGroup)
        for i in range(len(group.convs)):
            conv, norm = group.convs[i], group.norms[i]
            assert isinstance(conv, nn.Conv2d)
            assert isinstance(norm, BatchNorm)
            group.convs[i] = nn.utils.fusion.fuse_conv_bn_eval(conv, norm)
            group.norms[i] = nn.Identity()
    return network


@torch.no_grad()
def unfold_batchnorms(network: ConvNet, folded: ConvNet, images: Tensor) -> None:
    """Sets an initialised network to the function of a folded one of the same shape.

    Each folded bias is split into running mean and bias by the mean of the batch norm's input for `images`, uint8
    [N, H, W, 3]. Filters get norm sqrt(out), which Muon keeps. A head for another number of classes is left unchanged.
    """
    assert isinstance(network.normalize, Normalize)
    assert network.whiten.bias is not None
    assert folded.whiten.bias is not None
    network.whiten.weight.copy_(folded.whiten.weight * network.normalize.std)
    network.whiten.bias.copy_(folded.whiten.bias + (folded.whiten.weight * network.normalize.mean).sum((1, 2, 3)))
    if network.head.weight.shape == folded.head.weight.shape:
        network.head.weight.copy_(folded.head.weight)
    hooks = []
    for group, stored in zip(network.groups, folded.groups, strict=True):
        assert isinstance(group, ConvGroup)
        assert isinstance(stored, ConvGroup)
        for conv, norm, folded_conv in zip(group.convs, group.norms, stored.convs, strict=True):
            assert isinstance(conv, nn.Conv2d)
            assert isinstance(folded_conv, nn.Conv2d)
            size = len(folded_conv.weight) ** 0.5 / float(folded_conv.weight.norm())
            conv.weight.copy_(folded_conv.weight * size)
            hooks.append(norm.register_forward_pre_hook(partial(_set_batchnorm, bias=folded_conv.bias, size=size)))
    network.eval()(images.permute(0, 3, 1, 2))
    for hook in hooks:
        hook.remove()


def _set_batchnorm(norm: nn.BatchNorm2d, inputs: tuple[Tensor], bias: Tensor | None, size: float) -> None:
    """Sets the batch norm to x / size + bias, with the mean of these inputs as its running mean."""
    mean = inputs[0].mean((0, 2, 3))
    assert bias is not None
    assert norm.running_mean is not None
    assert norm.running_var is not None
    norm.running_mean.copy_(mean)
    norm.running_var.fill_(size**2 - norm.eps)
    norm.bias.copy_(bias + mean / size)
