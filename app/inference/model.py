"""What the batcher needs of a model."""

from collections.abc import Sequence
from typing import Protocol, TypeVar

Item = TypeVar("Item", contravariant=True)
Result = TypeVar("Result", covariant=True)


class Model(Protocol[Item, Result]):
    """What runs a request's items. Another one may serve later requests while this one finishes its own."""

    def __call__(self, items: Sequence[Item], exclusive: bool) -> Sequence[Result]:
        """One result per item; an exclusive call runs beside no other exclusive call."""
        ...

    def verify(self) -> None:
        """Raises an exception if every later call will fail."""
        ...
