"""Lanes of captured forward passes, on a stream of the CPU that repeats the pass on the same buffers."""

import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from app.engines import graphs, verify_references
from app.engines.graphs import Captured, Forward
from app.engines.pytorch import TorchEngine
from app.errors import DeviceError
from app.model import weights

SIZES = [1, 2, 4, 8]


class CpuStream:
    """As `CudaStream`: a replay reads and writes the buffers of its capture. `captured` has the sizes in order."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.captured: list[int] = []
        self.replayed: list[int] = []
        self.synchronised = 0

    def pinned(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return torch.empty(tuple(shape), dtype=dtype)

    def capture(self, forward: Forward, images: Tensor) -> Captured:
        self.captured.append(len(images))
        output = forward(images).clone()

        def replay() -> None:
            self.replayed.append(len(images))
            output.copy_(forward(images))

        return Captured(replay, output)

    def active(self) -> nullcontext[None]:
        return nullcontext()

    def synchronize(self) -> None:
        self.synchronised += 1


def means(images: Tensor) -> Tensor:
    """Class i: the mean of the image's pixels, plus i."""
    return images.float().mean((1, 2, 3))[:, None] + torch.arange(3)


def noise(count: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (count, 6, 6, 3), np.uint8)


def build(streams: list[CpuStream], lanes: int = 2, forward: Forward = means) -> graphs.GraphedForward:
    def make_stream() -> CpuStream:
        streams.append(CpuStream())
        return streams[-1]

    return graphs.build(forward, SIZES, 6, 3, make_stream, lanes)


def test_batch_is_filled_up_to_the_next_size() -> None:
    streams: list[CpuStream] = []
    graphed = build(streams, lanes=1)
    for count in range(1, 9):
        images = noise(count, count)
        assert np.array_equal(graphed(images), means(torch.from_numpy(images)).numpy())
    assert streams[0].replayed == [1, 2, 4, 4, 8, 8, 8, 8]
    assert streams[0].synchronised == 8


def test_largest_size_is_captured_first() -> None:
    streams: list[CpuStream] = []
    build(streams)
    assert [stream.captured for stream in streams] == [[8, 4, 2, 1]] * 2


def test_earlier_results_are_not_overwritten() -> None:
    graphed = build([], lanes=1)
    first = graphed(noise(4, 1))
    kept = first.copy()
    graphed(noise(4, 2))
    assert np.array_equal(first, kept)


def test_lanes_run_concurrently_and_without_mixing() -> None:
    entered = threading.Barrier(2, timeout=30)
    capturing = True

    def meet(images: Tensor) -> Tensor:
        if not capturing:
            entered.wait()  # raises unless the other lane runs at the same time
        return means(images)

    graphed = build([], lanes=2, forward=meet)
    capturing = False
    with ThreadPoolExecutor(2) as pool:
        for i in range(20):
            batches = [noise(1 + (i + j) % 8, 10 * i + j) for j in range(2)]
            for images, found in zip(batches, pool.map(graphed, batches), strict=True):
                assert np.array_equal(found, means(torch.from_numpy(images)).numpy())


def test_third_call_waits_for_a_lane() -> None:
    release, running = threading.Event(), threading.Semaphore(0)
    capturing = True

    def block(images: Tensor) -> Tensor:
        if not capturing:
            running.release()
            assert release.wait(30)
        return means(images)

    graphed = build([], lanes=2, forward=block)
    capturing = False
    with ThreadPoolExecutor(3) as pool:
        calls = [pool.submit(graphed, noise(1)) for _ in range(3)]
        assert running.acquire(timeout=30)
        assert running.acquire(timeout=30)
        time.sleep(0.1)
        assert not running.acquire(blocking=False)
        release.set()
        assert all(len(call.result(30)) == 1 for call in calls)


def test_engine_with_graphs_reproduces_the_references(tiny_weights: Path) -> None:
    loaded = weights.load(tiny_weights)
    eager = TorchEngine(loaded, "cpu", 1, "float32")
    engine = TorchEngine(loaded, "cpu", 1, "float32", CpuStream)
    assert (eager.streams, engine.streams) == (1, 2)
    engine.prepare(SIZES, loaded.reference_images[0])
    verify_references(engine, loaded)
    images = np.random.default_rng(0).integers(0, 256, (11, 32, 32, 3), np.uint8)
    for count in (1, 3, 8, 11):  # the last one is larger than every graph
        difference = np.abs(engine(images[:count]).probabilities - eager(images[:count]).probabilities)
        assert difference.max() < 1e-5


def test_scores_of_graphs_equal_the_eager_ones(ood_weights: Path) -> None:
    loaded = weights.load(ood_weights)
    eager = TorchEngine(loaded, "cpu", 1, "float32")
    engine = TorchEngine(loaded, "cpu", 1, "float32", CpuStream)
    engine.prepare(SIZES, loaded.reference_images[0])
    images = np.random.default_rng(0).integers(0, 256, (11, 32, 32, 3), np.uint8)
    for count in (1, 3, 8, 11):
        output, expected = engine(images[:count]), eager(images[:count])
        assert output.probabilities.shape == (count, 10)
        assert np.abs(output.probabilities - expected.probabilities).max() < 1e-5
        assert output.ood is not None
        assert expected.ood is not None
        assert np.abs(output.ood - expected.ood).max() < 1e-3


def test_graphs_with_other_outputs_are_not_used(tiny_weights: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Wrong(CpuStream):
        def capture(self, forward: Forward, images: Tensor) -> Captured:
            _, output = super().capture(forward, images)
            return Captured(lambda: None, torch.full_like(output, torch.nan))

    loaded = weights.load(tiny_weights)
    engine = TorchEngine(loaded, "cpu", 1, "float32", Wrong)
    engine.prepare(SIZES, loaded.reference_images[0])
    assert "no CUDA graphs are used" in caplog.text
    verify_references(engine, loaded)


def test_lack_of_memory_during_a_capture_is_one_line(tiny_weights: Path) -> None:
    class Full(CpuStream):
        def capture(self, forward: Forward, images: Tensor) -> Captured:
            raise torch.OutOfMemoryError("CUDA out of memory.\nmore")

    loaded = weights.load(tiny_weights)
    with pytest.raises(DeviceError, match=r"too little memory; a smaller MAX_BATCH needs less: CUDA out of memory\.$"):
        TorchEngine(loaded, "cpu", 1, "float32", Full).prepare(SIZES, loaded.reference_images[0])
