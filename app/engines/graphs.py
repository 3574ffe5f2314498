"""CUDA graphs of a network, one for each prepared batch size: one launch instead of one per kernel.

A small network on a fast GPU otherwise waits for its launches. The graphs read and write buffers that stay where they
are, so the copies use pinned memory that is allocated once. Several lanes, each with a stream and buffers of its own,
overlap the copies of one batch with the kernels of another. See "CUDA Graphs" in torch's notes on CUDA semantics.
"""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from queue import SimpleQueue
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

LANES = 2
WARM_UP_RUNS = 3  # before a capture, as torch's notes advise: libraries choose kernels and allocate

Forward = Callable[[Tensor], Tensor]  # uint8 [N, S, S, 3] to float32 [N, columns], on the device


class Captured(NamedTuple):
    """`replay` computes `output` float32 [N, columns] from the buffer that the forward pass was captured on."""

    replay: Callable[[], None]
    output: Tensor


class Stream(Protocol):
    """What a lane needs of a device; the tests have one of the CPU."""

    @property
    def device(self) -> torch.device: ...

    def pinned(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor: ...

    def capture(self, forward: Forward, images: Tensor) -> Captured: ...

    def active(self) -> AbstractContextManager[object]: ...

    def synchronize(self) -> None: ...


class CudaStream:
    """A stream of a GPU, and the memory pool that all of its graphs share."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def pinned(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return torch.empty(tuple(shape), dtype=dtype, pin_memory=True)

    def capture(self, forward: Forward, images: Tensor) -> Captured:
        with self.active():
            for _ in range(WARM_UP_RUNS):
                forward(images)
        self.synchronize()
        graph = torch.cuda.CUDAGraph()
        # thread_local: calls of other threads, such as those of another lane, do not end the capture.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            output = forward(images)
        return Captured(graph.replay, output)

    def active(self) -> AbstractContextManager[object]:
        return torch.cuda.stream(self._stream)

    def synchronize(self) -> None:
        self._stream.synchronize()


class Lane:
    """Buffers for batches up to the largest of `sizes`, and a captured forward pass for each size."""

    def __init__(self, stream: Stream, forward: Forward, sizes: Sequence[int], side: int, columns: int) -> None:
        largest = max(sizes)
        self._stream = stream
        self._host_images = stream.pinned((largest, side, side, 3), torch.uint8)
        self._host_output = stream.pinned((largest, columns), torch.float32)
        self._images = torch.zeros((largest, side, side, 3), dtype=torch.uint8, device=stream.device)
        # The largest first: the graphs of smaller batches fit into its memory.
        self._captured = {size: stream.capture(forward, self._images[:size]) for size in sorted(sizes, reverse=True)}
        self._pixels = self._host_images.numpy()
        self._rows = self._host_output.numpy()

    def run(self, images: NDArray[np.uint8], size: int) -> NDArray[np.float32]:
        """The output float32 [N, columns] of N images in a batch of `size`; the other rows are left over."""
        count = len(images)
        self._pixels[:count] = images
        replay, output = self._captured[size]
        with self._stream.active():
            self._images[:count].copy_(self._host_images[:count], non_blocking=True)
            replay()
            self._host_output[:count].copy_(output[:count], non_blocking=True)
        self._stream.synchronize()
        return self._rows[:count].copy()


class GraphedForward:
    """A forward pass in lanes; as many threads may call it at a time. A batch is filled up to the next size."""

    def __init__(self, lanes: Sequence[Lane], sizes: Sequence[int]) -> None:
        self.lanes = len(lanes)
        self._sizes = sorted(sizes)
        self._free: SimpleQueue[Lane] = SimpleQueue()
        for lane in lanes:
            self._free.put(lane)

    @property
    def largest(self) -> int:
        return self._sizes[-1]

    @torch.inference_mode()
    def __call__(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """At most `largest` images uint8 [N, S, S, 3] to float32 [N, columns]."""
        size = self._sizes[bisect_left(self._sizes, len(images))]
        lane = self._free.get()
        try:
            return lane.run(images, size)
        finally:
            self._free.put(lane)


@torch.inference_mode()
def build(
    forward: Forward,
    sizes: Sequence[int],
    side: int,
    columns: int,
    make_stream: Callable[[], Stream],
    lanes: int = LANES,
) -> GraphedForward:
    """Captures every size in every lane. Raises what the device raises."""
    return GraphedForward([Lane(make_stream(), forward, sizes, side, columns) for _ in range(lanes)], sizes)
