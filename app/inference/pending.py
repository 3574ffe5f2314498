"""A future that a thread completes on the event loop that waits for it."""

import asyncio
from abc import ABC, abstractmethod
from typing import Generic, TypeVar

Value = TypeVar("Value")


class Pending(ABC, Generic[Value]):
    """Work of another thread: `value()` is its result unless `error` is set."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.future: asyncio.Future[Value] = loop.create_future()
        self.error: Exception | None = None

    @abstractmethod
    def value(self) -> Value: ...

    def resolve(self) -> None:
        """Completes the future; runs on its event loop."""
        if self.future.done():
            return
        if self.error is not None:
            self.future.set_exception(self.error)
        else:
            self.future.set_result(self.value())
