"""A small network that picks, out of each batch of candidates, the images that are worth a large network's time."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from training import optimizers
from training.distributed import Ranks
from training.recipe import Recipe

UPDATE_EVERY = 4  # steps; which images are hard changes slowly


class Selector:
    """Keeps the images of the highest loss, and learns from those itself.

    After Jordan 2024, airbench96_faster.py in github.com/KellerJordan/cifar10-airbench, where the small network runs
    through the whole training first; here it walks beside the large one, so that no choice has to be remembered.
    """

    def __init__(
        self, network: nn.Module, recipe: Recipe, batch_size: int, total: int, device: torch.device, ranks: Ranks
    ) -> None:
        self.network = network.to(device).to(memory_format=torch.channels_last)
        self.recipe = recipe
        self.optimizers = optimizers.build(self.network, recipe, batch_size, total, per_epoch=1)
        self._parallel = ranks.wrap(self.network)

    def __call__(self, images: Tensor, labels: Tensor, step: int) -> Tensor:
        """Images [N, 3, H, W] and labels int64 [N] to the places int64 [N * keep] of the hardest."""
        learns = step % UPDATE_EVERY == 0
        with torch.autocast(images.device.type, torch.bfloat16), torch.set_grad_enabled(learns):
            logits = self._parallel(images)
            losses = F.cross_entropy(logits, labels, label_smoothing=self.recipe.label_smoothing, reduction="none")
        hardest = losses.detach().topk(max(1, round(len(labels) * self.recipe.keep))).indices
        if learns:
            optimizers.update(self.optimizers, losses[hardest].sum(), step)
        return hardest

    def state(self) -> dict[str, Any]:
        return {
            "network": self.network.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }

    def restore(self, state: dict[str, Any]) -> None:
        self.network.load_state_dict(state["network"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
