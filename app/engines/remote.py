"""The engine of another process: what a front end has instead of an engine library."""

import socket
import weakref
from collections.abc import Sequence
from queue import SimpleQueue

import numpy as np
from numpy.typing import NDArray

from app.engines import channel
from app.engines.base import Output
from app.engines.channel import Channel, Description, Operation, Status
from app.errors import DeviceLostError
from app.model.card import ModelCard
from app.model.weights import Weights


class RemoteEngine:
    """Calls the engine process over channels, one call at a time on each.

    Outputs equal those of the direct engine bit for bit. `weights` has the card and the digest of the engine's file,
    without tensors. Construction waits for the engine process. Raises DeviceLostError if it exits. The channels are
    closed with the last reference: a worker thread may hold it longer than any request. The link stays open.
    """

    def __init__(self, link: socket.socket) -> None:
        description, channels = channel.connect(link)
        self.name, self.device, self.precision = description.name, description.device, description.precision
        self.streams = len(channels)
        self.max_batch = description.layout.max_batch
        self.fingerprint = description.fingerprint
        self.cost = description.cost
        self.weights = _weights(description)
        self._free: SimpleQueue[Channel] = SimpleQueue()
        for each in channels:
            self._free.put(each)
        self._finalizer = weakref.finalize(self, _close, [each.connection for each in channels])

    def __call__(self, images: NDArray[np.uint8], exclusive: bool = True) -> Output:
        """`exclusive` has no effect: the engine process decides. Raises RuntimeError where the engine raised."""
        count = len(images)
        free = self._free.get()
        try:
            free.pixels[:count] = images
            if free.call(Operation.RUN, count) is not Status.DONE:
                raise RuntimeError(f"inference failed for {count} images; the log of the engine process has the cause")
            ood = None if np.isnan(free.ood[:count]).all() else free.ood[:count].copy()
            return Output(free.probabilities[:count].copy(), free.stages[:count].copy(), ood)
        finally:
            self._free.put(free)

    def verify(self) -> None:
        """The engine process reproduces its reference outputs, or exits. Raises DeviceLostError then."""
        free = self._free.get()
        try:
            if free.call(Operation.VERIFY) is not Status.DONE:
                raise DeviceLostError("The engine process does not reproduce the reference outputs.")
        finally:
            self._free.put(free)

    def prepare(self, sizes: Sequence[int], image: NDArray[np.uint8]) -> None:
        """The engine process has done it."""

    def memory(self) -> None:
        """The engine process reports it."""

    def close(self) -> None:
        """Closes the channels; no call may follow."""
        self._finalizer()


def load(link: socket.socket) -> Weights:
    """The weights that the engine process has loaded from the settings' path, without tensors.

    Raises WeightsError with the reason where it keeps its former model, DeviceLostError if it exits.
    """
    return _weights(channel.load(link))


def _weights(description: Description) -> Weights:
    card = ModelCard.model_validate(description.card)
    size = card.input_size
    blank = np.zeros((1, size, size, 3), np.uint8)
    return Weights(card, {}, blank, np.empty((0, len(card.classes)), np.float32), description.sha256)


def _close(connections: Sequence[socket.socket]) -> None:
    for connection in connections:
        connection.close()
