"""Muon: momentum whose update is made orthogonal (Jordan et al. 2024, kellerjordan.github.io/posts/muon)."""

from math import inf
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from app.model.networks import BatchNorm, ConvNet
from training.recipe import Recipe

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # quintic with the steepest slope at zero, from the same source


def orthogonalize(matrix: Tensor, steps: int = 3) -> Tensor:
    """Nearest semi-orthogonal matrix to [rows, columns], roughly: singular values end in about 0.5 to 1.5."""
    a, b, c = NEWTON_SCHULZ
    tall = matrix.shape[0] > matrix.shape[1]
    x: Tensor = (matrix.T if tall else matrix).bfloat16()
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if tall else x


class Muon(Optimizer):
    """For convolution filters, flattened to [out, in * k * k].

    Before each step the filters are scaled back to norm sqrt(out), which takes the place of weight decay.
    torch.optim.Muon takes 2-D parameters only and has no such scaling.
    """

    def __init__(self, params: Any, lr: float, momentum: float) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(p)
                buffer = state["momentum_buffer"].mul_(group["momentum"]).add_(p.grad)
                update = p.grad.add(buffer, alpha=group["momentum"])
                p.mul_(len(p) ** 0.5 / p.norm())
                p.add_(orthogonalize(update.flatten(1)).view_as(p), alpha=-group["lr"])


def build(network: nn.Module, recipe: Recipe, batch_size: int, total: int, per_epoch: int) -> list[Optimizer]:
    """The recipe's optimizers. Every group carries `initial_lr` and `end`, the step at which its rate is 0."""
    trainable = [parameter for parameter in network.parameters() if parameter.requires_grad]
    if isinstance(network, ConvNet) and recipe.optimizer == "muon":
        optimizers = _muon_and_sgd(network, recipe, batch_size, total, per_epoch)
    elif recipe.optimizer == "adam":
        optimizers = [_adam(trainable, recipe.lr, total)]
    else:
        optimizers = [torch.optim.SGD([{"params": trainable, "end": inf}], recipe.lr, recipe.momentum)]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
    return optimizers


def _muon_and_sgd(network: ConvNet, recipe: Recipe, batch_size: int, total: int, per_epoch: int) -> list[Optimizer]:
    """Muon for the filters, SGD for biases and head, at rates for losses summed over a batch of any size."""
    shrink = recipe.weight_decay * batch_size
    norms = [module.bias for module in network.modules() if isinstance(module, BatchNorm)]
    groups = [
        ([network.whiten.bias], recipe.bias_lr, min(total, recipe.whiten_bias_epochs * per_epoch)),
        (norms, recipe.bias_lr, total),
        ([network.head.weight], recipe.head_lr, total),
    ]
    sgd = torch.optim.SGD(
        [{"params": params, "lr": lr, "weight_decay": shrink / lr, "end": end} for params, lr, end in groups],
        momentum=recipe.momentum,
        nesterov=True,
    )
    filters = [parameter for parameter in network.groups.parameters() if parameter.ndim == 4]
    return [sgd, Muon([{"params": filters, "end": total}], recipe.filter_lr, recipe.filter_momentum)]


def _adam(trainable: list[nn.Parameter], lr: float, total: int) -> Optimizer:
    """Three times the rate for what is no filter: there are few of these, and each does more."""
    filters = [parameter for parameter in trainable if parameter.ndim == 4]
    others = [parameter for parameter in trainable if parameter.ndim != 4]
    groups = [{"params": filters, "lr": lr, "end": total}, {"params": others, "lr": 3 * lr, "end": total}]
    return torch.optim.Adam([group for group in groups if group["params"]], betas=(0.9, 0.98))


def update(optimizers: list[Optimizer], loss: Tensor, step: int) -> None:
    """One step down the gradient of `loss`, at rates that fall linearly from their initial values to 0 at their end."""
    for optimizer in optimizers:
        optimizer.zero_grad()
    loss.backward()
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * (1 - step / group["end"]) if step < group["end"] else 0.0
        optimizer.step()


def freeze_ended(optimizers: list[Optimizer], step: int) -> None:
    """Spares the gradients of parameters whose rate has come to 0 for good."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            if step >= group["end"]:
                for parameter in group["params"]:
                    parameter.requires_grad_(False)
