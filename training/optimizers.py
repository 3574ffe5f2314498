"""Muon and its companions: parameter groups, and learning rates that fall linearly to 0."""

from math import inf
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from app.model.networks import BatchNorm, ConvNet
from training.recipe import Recipe

# Coefficients of the quintic with the steepest slope at 0 (Jordan et al. 2024, kellerjordan.github.io/posts/muon).
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def orthogonalize(matrix: Tensor, steps: int = 3) -> Tensor:
    """Approximates the nearest semi-orthogonal matrix of [rows, columns] by Newton-Schulz iteration.

    Singular values end between about 0.5 and 1.5. Three steps are enough for a gradient direction; five are usual.
    """
    a, b, c = NEWTON_SCHULZ
    # The Gram matrix x @ x.T is smallest when x has no more rows than columns.
    tall = matrix.shape[0] > matrix.shape[1]
    x: Tensor = (matrix.T if tall else matrix).bfloat16()  # precise enough for a direction
    x = x / (x.norm() + 1e-7)  # the iteration converges for singular values up to 1
    for _ in range(steps):
        gram = x @ x.T
        # p(x) = a x + b x^3 + c x^5, applied to every singular value.
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if tall else x


class Muon(Optimizer):
    """Momentum with an orthogonalised update, for convolution filters flattened to [out, in * k * k].

    Filters are rescaled to norm sqrt(out) before each step, instead of weight decay: batch norm makes their scale
    irrelevant, and a fixed norm gives the learning rate a fixed meaning. torch.optim.Muon accepts 2-D parameters only
    and does not rescale.
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
                update = p.grad.add(buffer, alpha=group["momentum"])  # Nesterov momentum
                p.mul_(len(p) ** 0.5 / p.norm())  # len(p) is the number of output channels
                p.add_(orthogonalize(update.flatten(1)).view_as(p), alpha=-group["lr"])


def build(
    network: nn.Module, recipe: Recipe, batch_size: int, total_steps: int, steps_per_epoch: int
) -> list[Optimizer]:
    """The recipe's optimizers. Each group holds `initial_lr` and `end_step`, at which its rate reaches 0."""
    trainable = [parameter for parameter in network.parameters() if parameter.requires_grad]
    if isinstance(network, ConvNet) and recipe.optimizer == "muon":
        optimizers = _muon_and_sgd(network, recipe, batch_size, total_steps, steps_per_epoch)
    elif recipe.optimizer == "adam":
        optimizers = [_adam(trainable, recipe.lr, total_steps)]
    else:
        optimizers = [torch.optim.SGD([{"params": trainable, "end_step": inf}], recipe.lr, recipe.sgd_momentum)]
    # Kept in the groups, as torch's schedulers do: a checkpoint then holds the whole schedule.
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
    return optimizers


def _muon_and_sgd(
    network: ConvNet, recipe: Recipe, batch_size: int, total_steps: int, steps_per_epoch: int
) -> list[Optimizer]:
    """Muon for filters, SGD for biases and head.

    Losses are summed over the batch, so SGD's rates are per image and hold for any batch size.
    """
    # SGD multiplies the decay by the learning rate; dividing by it decouples the two (airbench).
    decay = recipe.weight_decay * batch_size
    norm_biases = [module.bias for module in network.modules() if isinstance(module, BatchNorm)]
    # The whitening bias adapts in the first epochs; afterwards its gradient, through all layers, is not worth its cost.
    whiten_end = min(total_steps, recipe.whiten_bias_epochs * steps_per_epoch)
    groups = [
        ([network.whiten.bias], recipe.norm_bias_lr, whiten_end),
        (norm_biases, recipe.norm_bias_lr, total_steps),
        ([network.head.weight], recipe.head_lr, total_steps),
    ]
    sgd = torch.optim.SGD(
        [{"params": params, "lr": lr, "weight_decay": decay / lr, "end_step": end} for params, lr, end in groups],
        momentum=recipe.sgd_momentum,
        nesterov=True,
    )
    filters = [parameter for parameter in network.groups.parameters() if parameter.ndim == 4]  # [out, in, 3, 3]
    muon = Muon([{"params": filters, "end_step": total_steps}], recipe.muon_lr, recipe.muon_momentum)
    return [sgd, muon]


def _adam(trainable: list[nn.Parameter], lr: float, total_steps: int) -> Optimizer:
    """Three times the rate for biases and linear layers: they are few, and each has more influence."""
    filters = [parameter for parameter in trainable if parameter.ndim == 4]
    others = [parameter for parameter in trainable if parameter.ndim != 4]
    groups = [
        {"params": filters, "lr": lr, "end_step": total_steps},
        {"params": others, "lr": 3 * lr, "end_step": total_steps},
    ]
    # beta2 below the usual 0.999: runs have few steps, so the second moment must adapt within tens of them.
    return torch.optim.Adam([group for group in groups if group["params"]], betas=(0.9, 0.98))


def update(optimizers: list[Optimizer], loss: Tensor, step: int, scaler: GradScaler | None = None) -> None:
    """One optimizer step, at rates that fall linearly from `initial_lr` at step 0 to 0 at `end_step`.

    An enabled scaler skips the step of an optimizer whose gradients are not finite.
    """
    scaler = scaler or GradScaler(loss.device.type, enabled=False)
    for optimizer in optimizers:
        optimizer.zero_grad()
    scaler.scale(loss).backward()
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            remaining = 1 - step / group["end_step"] if step < group["end_step"] else 0.0
            group["lr"] = group["initial_lr"] * remaining
        scaler.step(optimizer)
    scaler.update()


def freeze_finished_groups(optimizers: list[Optimizer], step: int) -> None:
    """Excludes parameters whose rate stays 0 from the backward pass."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            if step >= group["end_step"]:
                for parameter in group["params"]:
                    parameter.requires_grad_(False)
