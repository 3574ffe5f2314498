"""The convolutions that are served in int8, and the range of each one's input."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from app.model.networks import ConvNet
from app.model.quantization import INPUT_LEVELS, LEAST_INPUT, input_ends
from training.predict import SERVED_BATCH

CANDIDATES = [0.95**i for i in range(45)]  # of the largest input
EVERY = 13  # one of so many inputs is looked at; a prime that few layers' sizes are multiples of


def convolutions(network: nn.Module) -> Iterator[tuple[str, nn.Conv2d]]:
    """Those of a ConvNet's groups, which are stored and served in int8, by name; none of other networks."""
    if isinstance(network, ConvNet):
        for name, module in network.groups.named_modules(prefix="groups"):
            if isinstance(module, nn.Conv2d):
                yield name, module


@torch.inference_mode()
def input_ranges(network: nn.Module, images: Tensor) -> dict[str, float]:
    """The largest input that each convolution should tell apart, from what it gets for images uint8 [N, S, S, 3].

    The one with the least squared error, rounding and clipping together (Choukroun et al. 2019, arXiv 1902.06822): the
    few largest inputs would make steps too coarse for all others.
    """
    inputs = {name: list[Tensor]() for name, _ in convolutions(network)}

    def note(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _, given: inputs[name].append(given[0].flatten()[::EVERY].clone())

    hooks = [module.register_forward_pre_hook(note(name)) for name, module in convolutions(network)]
    for part in images.split(SERVED_BATCH):
        network(part.permute(0, 3, 1, 2))
    for hook in hooks:
        hook.remove()
    return {name: best_range(torch.cat(parts)) for name, parts in inputs.items()}


def best_range(inputs: Tensor) -> float:
    """The largest input to tell apart that rounds these float32 [N] with the least squared error."""
    largest = max(inputs.max().item(), -LEAST_INPUT)  # above 0 even where a layer before it has died
    return min((share * largest for share in CANDIDATES), key=lambda top: _squared_error(inputs, top))


def _squared_error(inputs: Tensor, top: float) -> float:
    low, high = input_ends(top)
    step = (high - low) / (INPUT_LEVELS - 1)
    rounded = (inputs.clamp(low, high) / step).round() * step
    return (inputs - rounded).square().mean().item()
