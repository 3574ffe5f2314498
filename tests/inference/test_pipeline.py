"""The pipeline's promises, with real images and a stand-in for the network."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import numpy as np
import pytest

from app.errors import DeadlineExceeded, NotReady, QueueFull, RequestError, UnsupportedImage
from app.inference.batcher import Batcher
from app.inference.classifier import Scores
from app.inference.decoding import DecodePool
from app.inference.pipeline import Deadline, Pipeline, Prediction, RejectedFile
from app.inference.queue import RequestQueue
from app.model.preprocessing import DecodedImage, Limits
from tests.support.images import LARGE, SMALL


class Network:
    """A classifier that returns each image's mean as its only probability; blocks while `free` is cleared."""

    batch_sizes = (1, 2, 4)

    def __init__(self, input_size: int = 32) -> None:
        self.input_size = input_size
        self.users = 0
        self.free = threading.Event()
        self.free.set()
        self.entered = threading.Event()
        self.images = 0

    def __call__(self, images: Sequence[DecodedImage], exclusive: bool) -> list[Scores]:
        self.entered.set()
        assert self.free.wait(30)
        assert {image.pixels.shape for image in images} == {(self.input_size, self.input_size, 3)}
        self.images += len(images)
        return [Scores(np.array([image.pixels.mean()], np.float32), 0) for image in images]


@asynccontextmanager
async def running(network: Network, max_queue: int = 64) -> AsyncIterator[Pipeline]:
    queue: RequestQueue[DecodedImage, Scores] = RequestQueue(max_queue)
    pipeline = Pipeline(network, DecodePool(Limits(32, 25_000_000), 10**9), Batcher([1, 2, 4], queue))
    pipeline.start()
    try:
        yield pipeline
    finally:
        network.free.set()
        await asyncio.to_thread(pipeline.close, 5)


def test_files_become_predictions_in_order() -> None:
    async def main() -> None:
        async with running(Network()) as pipeline:
            classification = await pipeline.classify([SMALL, b"no image", LARGE], Deadline.after(30))
            first, second, third = classification.outcomes
            assert isinstance(first, Prediction)
            assert isinstance(second, UnsupportedImage)
            assert isinstance(third, Prediction)
            assert (first.resized_from, third.resized_from) == (None, (1500, 1000))
            assert min(classification.decode_s, classification.queue_s, classification.inference_s) > 0
            assert pipeline.batcher.queue.size == 0

    asyncio.run(main())


def test_bad_files_alone_never_reach_the_network() -> None:
    network = Network()

    async def main() -> None:
        async with running(network) as pipeline:
            (outcome,) = (await pipeline.classify([b"no image"], Deadline.after(30))).outcomes
            assert isinstance(outcome, RequestError)
            with pytest.raises(RejectedFile) as rejected:
                await pipeline.classify([SMALL, b"no image"], Deadline.after(30), errors_per_file=False)
            assert rejected.value.index == 1
            assert pipeline.batcher.queue.size == 0

    asyncio.run(main())
    assert network.images == 0


def test_images_count_while_they_are_decoded() -> None:
    async def main() -> None:
        async with running(Network(), max_queue=12) as pipeline:
            large = asyncio.create_task(pipeline.classify([LARGE] * 10, Deadline.after(60)))
            await asyncio.sleep(0)  # its places are reserved in its first step
            assert pipeline.batcher.queue.size == 10
            with pytest.raises(QueueFull):
                await pipeline.classify([SMALL] * 3, Deadline.after(60))
            await pipeline.classify([SMALL] * 2, Deadline.after(60))
            await large

    asyncio.run(main())


def test_deadline_covers_decoding() -> None:
    async def main() -> None:
        async with running(Network()) as pipeline:
            with pytest.raises(DeadlineExceeded, match=r"No answer within 0.1 s"):
                await pipeline.classify([LARGE] * 60, Deadline.after(0.1))
            assert pipeline.batcher.queue.size == 0

    asyncio.run(main())


def test_deadline_covers_queue_and_network() -> None:
    network = Network()

    async def main() -> None:
        async with running(network) as pipeline:
            network.free.clear()
            tasks = [asyncio.create_task(pipeline.classify([SMALL], Deadline.after(0.2))) for _ in range(3)]
            outcomes = await asyncio.gather(*tasks, return_exceptions=True)
            assert all(isinstance(outcome, DeadlineExceeded) for outcome in outcomes)
            assert pipeline.batcher.queue.size == 0

    asyncio.run(main())


def test_cancelled_request_leaves_no_work() -> None:
    network = Network()

    async def main() -> None:
        async with running(network) as pipeline:
            network.free.clear()
            first = asyncio.create_task(pipeline.classify([SMALL], Deadline.after(30)))
            await asyncio.to_thread(network.entered.wait, 10)
            waiting = asyncio.create_task(pipeline.classify([SMALL] * 5, Deadline.after(30)))
            decoding = asyncio.create_task(pipeline.classify([LARGE] * 5, Deadline.after(30)))
            await asyncio.sleep(0.02)
            assert pipeline.batcher.queue.size == 10
            waiting.cancel()
            decoding.cancel()
            await asyncio.sleep(0.02)
            assert pipeline.batcher.queue.size == 0
            network.free.set()
            await first

    asyncio.run(main())
    assert network.images == 1


def test_closed_pipeline_is_not_ready() -> None:
    async def main() -> None:
        async with running(Network()) as pipeline:
            await asyncio.to_thread(pipeline.close, 5)
            with pytest.raises(NotReady):
                await pipeline.classify([SMALL], Deadline.after(30))

    asyncio.run(main())


def test_past_deadline_is_exceeded_at_once() -> None:
    async def main() -> None:
        async with running(Network()) as pipeline:
            with pytest.raises(DeadlineExceeded):
                await pipeline.classify([LARGE], Deadline(1, time.monotonic() - 1))

    asyncio.run(main())


def test_a_request_keeps_the_classifier_that_it_started_with() -> None:
    old, new = Network(32), Network(48)

    async def main() -> None:
        async with running(old) as pipeline:
            old.free.clear()
            first = asyncio.create_task(pipeline.classify([SMALL], Deadline.after(30)))
            await asyncio.to_thread(old.entered.wait, 10)
            waiting = asyncio.create_task(pipeline.classify([SMALL] * 3, Deadline.after(30)))
            decoding = asyncio.create_task(pipeline.classify([LARGE] * 2, Deadline.after(30)))
            await asyncio.sleep(0.02)
            assert pipeline.replace(new) is old
            later = asyncio.create_task(pipeline.classify([SMALL, LARGE], Deadline.after(30)))
            await asyncio.sleep(0.02)
            assert (old.users, new.users) == (3, 1)
            old.free.set()
            await asyncio.gather(first, waiting, decoding, later)
            assert (old.users, new.users) == (0, 0)

    asyncio.run(main())
    assert (old.images, new.images) == (6, 2)
