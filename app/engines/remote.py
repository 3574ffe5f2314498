"""The engine of another process: what a front end has instead of an engine library."""

import socket
from collections.abc import Sequence
from queue import SimpleQueue

import numpy as np
from numpy.typing import NDArray

from app.engines.base import Output
from app.engines.channel import Channel, Operation, Status, accept
from app.errors import DeviceLostError
from app.model.card import ModelCard
from app.model.weights import Weights


class RemoteEngine:
    """Calls the engine process over channels, one call at a time on each.

    Outputs equal those of the direct engine bit for bit. `weights` has the card and the digest of the engine's file,
    without tensors. Construction waits for the engine process. Raises DeviceLostError if it exits.
    """

    def __init__(self, link: socket.socket) -> None:
        description, channels = accept(link)
        self.name, self.device, self.precision = description.name, description.device, description.precision
        self.streams = len(channels)
        self.max_batch = description.layout.max_batch
        card = ModelCard.model_validate(description.card)
        size = card.input_size
        blank = np.zeros((1, size, size, 3), np.uint8)
        self.weights = Weights(card, {}, blank, np.empty((0, len(card.classes)), np.float32), description.sha256)
        self._link = link  # the engine process sees its close as the exit of this front end
        self._channels = channels
        self._free: SimpleQueue[Channel] = SimpleQueue()
        for channel in channels:
            self._free.put(channel)

    def __call__(self, images: NDArray[np.uint8], exclusive: bool = True) -> Output:
        """`exclusive` has no effect: the engine process decides. Raises RuntimeError where the engine raised."""
        count = len(images)
        channel = self._free.get()
        try:
            channel.pixels[:count] = images
            if channel.call(Operation.RUN, count) is not Status.DONE:
                raise RuntimeError(f"inference failed for {count} images; the log of the engine process has the cause")
            return Output(channel.probabilities[:count].copy(), channel.stages[:count].copy())
        finally:
            self._free.put(channel)

    def verify(self) -> None:
        """The engine process reproduces its reference outputs, or exits. Raises DeviceLostError then."""
        channel = self._free.get()
        try:
            if channel.call(Operation.VERIFY) is not Status.DONE:
                raise DeviceLostError("The engine process does not reproduce the reference outputs.")
        finally:
            self._free.put(channel)

    def prepare(self, sizes: Sequence[int], image: NDArray[np.uint8]) -> None:
        """The engine process has done it."""

    def memory(self) -> None:
        """The engine process reports it."""

    def close(self) -> None:
        """No call may follow."""
        for connection in (self._link, *(channel.connection for channel in self._channels)):
            connection.close()
