"""The mean of several networks that one run came to, which does better than each of them.

Izmailov et al. 2018, "Averaging Weights Leads to Wider Optima and Better Generalization" (arXiv 1803.05407).
"""

import copy
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

State = dict[str, Tensor]


@torch.no_grad()
def mean(network: nn.Module, others: Sequence[State]) -> nn.Module:
    """A network with the mean of its own and the other states' parameters, and its own normalisation."""
    mean = copy.deepcopy(network)
    for name, parameter in mean.named_parameters():
        states = [parameter, *(state[name].to(parameter.device) for state in others)]
        parameter.copy_(torch.stack(states).mean(0))
    return mean


@torch.no_grad()
def follow(network: nn.Module, images: Iterable[Tensor]) -> None:
    """Gives the normalisation the statistics of the images, uint8 [N, 3, H, W], as they are seen in training."""
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    before = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the mean over all batches
    network.train()
    for batch in images:
        with torch.autocast(batch.device.type, torch.bfloat16):
            network(batch)
    for norm, momentum in zip(norms, before, strict=True):
        norm.momentum = momentum
    network.eval()
