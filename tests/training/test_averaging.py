import copy

import torch
from torch.nn import functional as F

from app.model.networks import ConvNet
from training.trainer import average, follow


def test_parameters_are_means_and_normalisation_follows_the_images() -> None:
    torch.manual_seed(0)
    network, images = ConvNet(3, (8, 8, 8)), torch.randint(0, 256, (2, 16, 3, 32, 32), dtype=torch.uint8)
    network.initialize(images[0].permute(0, 2, 3, 1))
    other = copy.deepcopy(network)
    torch.nn.init.normal_(other.head.weight)
    torch.nn.init.normal_(other.groups[0].convs[0].weight)
    mean = average(network, [other.state_dict(), other.state_dict()])
    follow(mean, images)
    for part in ("head.weight", "groups.0.convs.0.weight", "whiten.weight"):
        expected = (network.get_parameter(part) + 2 * other.get_parameter(part)) / 3
        assert torch.allclose(mean.get_parameter(part), expected, atol=1e-6)
    with torch.no_grad():
        seen = mean.normalize(images.flatten(0, 1).float())
        maps = F.max_pool2d(mean.groups[0].convs[0](F.gelu(mean.whiten(seen))), 2)
    norm = mean.groups[0].norms[0]
    assert torch.allclose(norm.running_mean, maps.mean((0, 2, 3)), atol=0.02)
    assert torch.allclose(norm.running_var, maps.var((0, 2, 3)), rtol=0.05)
    assert not mean.training
    assert norm.momentum == network.groups[0].norms[0].momentum
