"""What a run does: its recipe, the choices that completed it, and the head that a network starts from."""

from typing import Any, NamedTuple

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
