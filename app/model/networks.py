"""The networks a weights file can name: uint8 images in, logits out, normalisation inside.

A network is trained as `build` makes it, and stored and served as `fold` leaves it.
"""

import copy
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SMALL_MAP = 16  # pixels, up to which a convolution learns by one product of matrices
WHITENING_KERNEL = 2  # pixels; patches of 2 x 2 x 3 colours have 12 principal directions


class Normalize(nn.Module):
    """Maps pixel values 0..255 to zero mean and unit deviation per channel, so that callers send plain uint8."""

    mean: Tensor
    std: Tensor

    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(1, channels, 1, 1))
        self.register_buffer("std", torch.ones(1, channels, 1, 1))

    def forward(self, pixels: Tensor) -> Tensor:
        return (pixels - self.mean) / self.std


class BatchNorm(nn.BatchNorm2d):
    """Batch normalisation without a learned scale: the next filter can learn it."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-5, momentum=0.4)  # few steps an epoch: statistics must follow fast
        self.weight.requires_grad = False


class Convolution(nn.Conv2d):
    """A 3x3 convolution whose first filters start as the identity (Zagoruyko & Komodakis 2017, "DiracNets").

    It learns on small maps by one product of matrices: oneDNN's own gradient of the filters took five times as long
    there (384 channels on 3 x 3 places, 1,000 images, two cores with AMX).
    """

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__(channels_in, channels_out, 3, padding=1, bias=False)
        nn.init.dirac_(self.weight.data[:channels_in])

    def forward(self, x: Tensor) -> Tensor:
        learns = torch.is_grad_enabled() and self.bias is None
        if learns and x.device.type == "cpu" and x.shape[2] * x.shape[3] <= SMALL_MAP:
            return F.linear(_patches(x), self.weight.permute(0, 2, 3, 1).flatten(1)).permute(0, 3, 1, 2)
        return super().forward(x)


def _patches(x: Tensor) -> Tensor:
    """What each output of a 3x3 convolution sees of [N, C, H, W]: [N, H, W, 9 C], the pixels row by row."""
    height, width = x.shape[2:]
    padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))
    return torch.cat([padded[:, i : i + height, j : j + width] for i in range(3) for j in range(3)], 3)


class ConvGroup(nn.Module):
    """Convolution and 2x2 max pooling, then `depth - 1` convolutions; from depth 3 on with a skip around them."""

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
    """Patch whitening, three groups of 3x3 convolutions, global max pooling, a linear head.

    The shape follows Jordan 2024, "94% on CIFAR-10 in 3.29 Seconds on a Single GPU" (arXiv 2404.00498).
    Takes uint8 images [N, 3, H, W] of at least 12 x 12 pixels, gives logits [N, classes].
    """

    def __init__(self, classes: int, widths: Sequence[int] = (64, 256, 256), depth: int = 2) -> None:
        super().__init__()
        patch = 3 * WHITENING_KERNEL**2
        self.normalize: nn.Module = Normalize()
        self.whiten = nn.Conv2d(3, 2 * patch, WHITENING_KERNEL)  # weights by `initialize`, then fixed
        self.whiten.weight.requires_grad = False
        channels = [2 * patch, *widths]
        self.groups = nn.Sequential(*(ConvGroup(i, o, depth) for i, o in pairwise(channels)))
        self.head = nn.Linear(widths[-1], classes, bias=False)
        nn.init.normal_(self.head.weight)

    @torch.no_grad()
    def initialize(self, images: Tensor) -> None:
        """Fits normalisation and whitening to a sample of the training images, uint8 [N, H, W, 3].

        The filters become the principal directions of the image's patches, scaled to unit variance, and their
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

    def forward(self, images: Tensor) -> Tensor:
        pixels = self.normalize(images.to(self.whiten.weight.dtype))
        x: Tensor = self.groups(F.gelu(self.whiten(pixels)))
        logits: Tensor = self.head(x.amax((2, 3)))
        return logits.float() / x.shape[1]


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
    """Three linear layers with sigmoids between them, on the image reduced to 4 x 4; for 10 classes 1,046 weights."""

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
    """Pixel values 0..255 to [0, 1], in the type that the network computes in."""
    return images.to(next(network.parameters()).dtype) / 255


ARCHITECTURES: dict[str, type[nn.Module]] = {"convnet": ConvNet, "lenet": LeNet, "mlp": MLP}


def build(architecture: str, arguments: dict[str, Any]) -> nn.Module:
    """A freshly initialised network to train; raises KeyError or TypeError where the description fits none."""
    return ARCHITECTURES[architecture](**arguments)


@torch.no_grad()
def fold(network: nn.Module) -> nn.Module:
    """The network as it is stored and served: a ConvNet's normalisations become part of the filters beside them.

    Batch normalisation has a positive scale, so that it may move before the max pooling that stands between. The
    whitening has no padding, so that the pixels' mean may move into its bias. Other networks stay as they are.
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
def unfold(network: ConvNet, folded: ConvNet, images: Tensor) -> None:
    """Gives an initialised network the parameters of a folded one of its shape, so that it answers the same.

    What the folding added up comes apart by the mean of what each normalisation sees of the images, uint8
    [N, H, W, 3]. Filters get the norm that Muon keeps. A head for another number of classes stays as it is.
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
        for conv, norm, whole in zip(group.convs, group.norms, stored.convs, strict=True):
            assert isinstance(conv, nn.Conv2d)
            assert isinstance(whole, nn.Conv2d)
            size = len(whole.weight) ** 0.5 / float(whole.weight.norm())
            conv.weight.copy_(whole.weight * size)
            hooks.append(norm.register_forward_pre_hook(partial(_split, bias=whole.bias, size=size)))
    network.eval()(images.permute(0, 3, 1, 2))
    for hook in hooks:
        hook.remove()


def _split(norm: nn.BatchNorm2d, inputs: tuple[Tensor], bias: Tensor | None, size: float) -> None:
    """Makes the normalisation of these inputs the same as division by `size` and addition of the bias."""
    mean = inputs[0].mean((0, 2, 3))
    assert bias is not None
    assert norm.running_mean is not None
    assert norm.running_var is not None
    norm.running_mean.copy_(mean)
    norm.running_var.fill_(size**2 - norm.eps)
    norm.bias.copy_(bias + mean / size)
