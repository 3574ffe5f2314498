"""Calls from a front end to the engine process: images and probabilities in shared memory, one message each way.

A front end has one link, a stream socket. It sends LOAD or CONNECT; the engine process answers with a description of
its model, after CONNECT with channels to it. The calls of these channels run on that model until the front end closes
them.

The memory is anonymous and the sockets are passed as descriptors, so the kernel frees both, however a process exits.
"""

import json
import mmap
import os
import socket
import tempfile
from enum import IntEnum
from struct import Struct
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from app.engines.batch_cost import BatchCost
from app.errors import DeviceLostError, WeightsError

CALL = Struct("=II")  # operation, images
RESULT = Struct("=I")  # status
REQUEST = Struct("=I")  # operation
LENGTH = Struct("=I")  # bytes of the JSON that follows
MAX_DESCRIPTORS = 64
ALIGNMENT = 64  # bytes; a cache line

LOST = "The engine process exited."


class Operation(IntEnum):
    RUN = 1
    VERIFY = 2  # reproduce the reference outputs
    LOAD = 3  # on the link: read the weights file again, and serve it
    CONNECT = 4  # on the link: channels to the model that serves


class Status(IntEnum):
    DONE = 1
    FAILED = 2


class Layout(NamedTuple):
    """The shape of a channel's arrays."""

    max_batch: int
    input_size: int
    classes: int

    @property
    def channel_bytes(self) -> int:
        return self._offsets()[-1]

    def _offsets(self) -> tuple[int, int, int, int]:
        """Where scores, pixels and stages begin, and where the next channel begins."""
        ood = _aligned(4 * self.max_batch * self.classes)
        pixels = _aligned(ood + 4 * self.max_batch)
        stages = pixels + self.max_batch * self.input_size**2 * 3
        return ood, pixels, stages, _aligned(stages + self.max_batch)


class Channel:
    """One end of one call at a time: a socket, and arrays of `layout.max_batch` images in shared memory.

    `pixels` uint8 [B, S, S, 3], `probabilities` float32 [B, classes], `stages` uint8 [B], `ood` float32 [B]: NaN
    for a file without scores.
    """

    def __init__(self, connection: socket.socket, memory: mmap.mmap, layout: Layout, index: int) -> None:
        self.connection = connection
        batch, size = layout.max_batch, layout.input_size
        start = index * layout.channel_bytes
        ood, pixels, stages, _ = layout._offsets()

        def array(dtype: Any, shape: tuple[int, ...], offset: int) -> NDArray[Any]:
            return np.ndarray(shape, dtype, memory, start + offset)

        self.probabilities: NDArray[np.float32] = array(np.float32, (batch, layout.classes), 0)
        self.ood: NDArray[np.float32] = array(np.float32, (batch,), ood)
        self.pixels: NDArray[np.uint8] = array(np.uint8, (batch, size, size, 3), pixels)
        self.stages: NDArray[np.uint8] = array(np.uint8, (batch,), stages)

    def call(self, operation: Operation, images: int = 0) -> Status:
        """Sends a call and waits for its result; raises DeviceLostError if the engine process exits."""
        try:
            self.connection.sendall(CALL.pack(operation, images))
            return Status(*RESULT.unpack(receive(self.connection, RESULT.size)))
        except OSError as error:
            raise DeviceLostError(LOST) from error

    def receive_call(self) -> tuple[Operation, int]:
        """Operation and number of images; raises ConnectionError after the front end has exited."""
        operation, images = CALL.unpack(receive(self.connection, CALL.size))
        return Operation(operation), images

    def reply(self, status: Status) -> None:
        """Raises OSError after the front end has exited."""
        self.connection.sendall(RESULT.pack(status))


class Description(NamedTuple):
    """The engine's attributes, the cost of a batch, and the card of the weights file as JSON.

    `fingerprint` is that of the file when it was read, by `app.model.file_watch`.
    """

    name: str
    device: str
    precision: str
    sha256: str
    card: dict[str, Any]
    layout: Layout
    cost: BatchCost
    channels: int
    fingerprint: tuple[int, ...] | None = None


def offer(link: socket.socket, description: Description) -> list[Channel]:
    """Sends the description with new shared memory and sockets; returns the engine process's ends. Raises OSError."""
    memory = _anonymous_memory(description.channels * description.layout.channel_bytes)
    pairs: list[tuple[socket.socket, socket.socket]] = []
    try:
        pairs += [socket.socketpair() for _ in range(description.channels)]
        _send(link, description._asdict(), [memory, *(theirs.fileno() for _, theirs in pairs)])
        return _channels([ours for ours, _ in pairs], memory, description)
    finally:
        os.close(memory)
        for _, theirs in pairs:
            theirs.close()


def describe(link: socket.socket, description: Description | Exception) -> None:
    """Answers LOAD: with the model that serves now, or with the reason why another one stays. Raises OSError.

    Also answers CONNECT where channels cannot be made.
    """
    if isinstance(description, Exception):
        _send(link, {"error": str(description) or repr(description)}, [])
    else:
        _send(link, description._asdict(), [])


def connect(link: socket.socket) -> tuple[Description, list[Channel]]:
    """Sends CONNECT and waits for the `offer`. Raises as `load`."""
    _request(link, Operation.CONNECT)
    return accept(link)


def load(link: socket.socket) -> Description:
    """Sends LOAD and waits for the model. Raises WeightsError with the reason, DeviceLostError."""
    _request(link, Operation.LOAD)
    fields, _ = _receive(link)
    return _description(fields)


def accept(link: socket.socket) -> tuple[Description, list[Channel]]:
    """The front end's side of `offer`; waits for it. Raises as `load`."""
    fields, descriptors = _receive(link)
    description = _description(fields)
    memory, *sockets = descriptors
    try:
        return description, _channels([socket.socket(fileno=each) for each in sockets], memory, description)
    finally:
        os.close(memory)


def receive(connection: socket.socket, count: int) -> bytes:
    """Exactly `count` bytes; raises ConnectionError if the other end closes first."""
    data = connection.recv(count)
    while len(data) < count:
        more = connection.recv(count - len(data))
        if not more:
            raise ConnectionError
        data += more
    return data


def _request(link: socket.socket, operation: Operation) -> None:
    try:
        link.sendall(REQUEST.pack(operation))
    except OSError as error:
        raise DeviceLostError(LOST) from error


def _send(link: socket.socket, fields: dict[str, Any], descriptors: list[int]) -> None:
    text = json.dumps(fields).encode()
    socket.send_fds(link, [LENGTH.pack(len(text))], descriptors)
    link.sendall(text)


def _receive(link: socket.socket) -> tuple[dict[str, Any], list[int]]:
    try:
        head, descriptors, *_ = socket.recv_fds(link, LENGTH.size, MAX_DESCRIPTORS)
        if len(head) < LENGTH.size:
            raise ConnectionError
        return json.loads(receive(link, *LENGTH.unpack(head))), descriptors
    except OSError as error:
        raise DeviceLostError(LOST) from error


def _description(fields: dict[str, Any]) -> Description:
    if "error" in fields:
        raise WeightsError(fields["error"])
    file = fields["fingerprint"]
    return Description(**fields)._replace(
        layout=Layout(*fields["layout"]),
        cost=BatchCost(*fields["cost"]),
        fingerprint=None if file is None else tuple(file),
    )


def _channels(sockets: list[socket.socket], descriptor: int, description: Description) -> list[Channel]:
    memory = mmap.mmap(descriptor, description.channels * description.layout.channel_bytes)
    return [Channel(each, memory, description.layout, index) for index, each in enumerate(sockets)]


def _anonymous_memory(size: int) -> int:
    """A descriptor of `size` zero bytes that no path leads to."""
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("thirtytwo")
    else:  # other systems than Linux
        with tempfile.TemporaryFile() as file:
            descriptor = os.dup(file.fileno())
    try:
        os.ftruncate(descriptor, size)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
