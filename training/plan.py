"""What a run does: its recipe, the choices that completed it, and the head that a network starts from."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch

from app.errors import DataError
from app.model.weights import Weights
from training.linear_head import LinearHead
from training.recipe import Recipe


class Choice(NamedTuple):
    """A value of the recipe that no flag gave, and why it was chosen."""

    field: str
    value: Any
    reason: str

    def __str__(self) -> str:
        flag = self.field.replace("_", "-")
        if isinstance(self.value, bool):
            return f"--{flag if self.value else 'no-' + flag}: {self.reason}"
        number = f"{self.value:.4g}" if isinstance(self.value, float) else self.value
        return f"--{flag} {number}: {self.reason}"


class Plan(NamedTuple):
    """The recipe without `auto`, its choices, and a head with the network it was fitted on, if one was fitted.

    With `trial`, validation images decide between the head and the network after training.
    """

    recipe: Recipe
    choices: list[Choice]
    backbone: Weights | None = None
    head: LinearHead | None = None
    trial: bool = False

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps of it, as tensors and plain values: the choices, and the head of a trial."""
        state: dict[str, Any] = {"choices": [tuple(choice) for choice in self.choices]}
        if self.trial and self.head is not None and self.backbone is not None:
            values = self.head._asdict().items()
            state["head"] = {name: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for name, v in values}
            state["start"] = self.backbone.version
        return state


def from_state(recipe: Recipe, state: Mapping[str, Any], backbone: Weights | None) -> Plan:
    """The inverse of `state_dict`, without a trial where there is no `backbone`; checkpoints of 0.1 have no state.

    Raises DataError where the backbone is not the one of the head.
    """
    choices = [Choice(*choice) for choice in state.get("choices", [])]
    if backbone is None or "head" not in state:
        return Plan(recipe, choices)
    if backbone.version != state["start"]:
        raise DataError(f"{recipe.initial_weights} has changed since the run started; start again without --resume.")
    values: dict[str, Any] = {
        name: v.numpy() if isinstance(v, torch.Tensor) else v for name, v in state["head"].items()
    }
    return Plan(recipe, choices, backbone, LinearHead(**values), trial=True)
