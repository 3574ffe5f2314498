"""The decoder threads: turns, budgets, deadlines and cancellation, with real images."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager

import numpy as np
import pytest

from app.errors import QueueFull, TooLarge, UndecodableImage, UnsupportedImage
from app.inference.decoding import DecodePool, File
from app.model.preprocessing import DecodedImage, Limits
from tests.support.images import LARGE, SMALL, png

LIMITS = Limits(32, 25_000_000)


@asynccontextmanager
async def running(max_request_pixels: int = 10**9) -> AsyncIterator[DecodePool]:
    pool = DecodePool(LIMITS, max_request_pixels)
    pool.start()
    try:
        yield pool
    finally:
        pool.close()


def run(test: Callable[[DecodePool], Awaitable[None]], max_request_pixels: int = 10**9) -> None:
    async def main() -> None:
        async with running(max_request_pixels) as pool:
            await test(pool)

    asyncio.run(main())


def decode(pool: DecodePool, files: Sequence[File], timeout_s: float = 60) -> Awaitable[list[DecodedImage]]:
    return pool.decode(files, time.monotonic() + timeout_s)  # type: ignore[return-value]


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 8, 9, 60])
def test_results_keep_the_order_of_the_files(count: int) -> None:
    known = UndecodableImage("known before")
    raw = DecodedImage(np.zeros((32, 32, 3), np.uint8), None)

    async def test(pool: DecodePool) -> None:
        results = await decode(pool, [SMALL, b"no image", known, raw, LARGE] * count)
        for i in range(0, 5 * count, 5):
            assert results[i].resized_from is None
            assert isinstance(results[i + 1], UnsupportedImage)
            assert results[i + 2] is known
            assert results[i + 3] is raw
            assert results[i + 4].resized_from == (1500, 1000)

    run(test)


@pytest.mark.slow
def test_small_file_does_not_wait_for_large_ones() -> None:
    async def test(pool: DecodePool) -> None:
        large = [asyncio.create_task(decode(pool, [LARGE] * 12)) for _ in range(4)]  # type: ignore[arg-type]
        await asyncio.sleep(0.05)
        await decode(pool, [png(300, 300)])
        assert not any(task.done() for task in large)
        await asyncio.gather(*large)

    run(test)


@pytest.mark.slow
@pytest.mark.parametrize("timeout_s", [60, 0.05])
def test_request_without_a_caller_or_past_its_deadline_is_dropped(timeout_s: float) -> None:
    async def test(pool: DecodePool) -> None:
        files = [png(500, 500)] * 3000  # 7 s
        job = asyncio.create_task(decode(pool, files, timeout_s))  # type: ignore[arg-type]
        await asyncio.sleep(0.2)
        if timeout_s > 1:
            job.cancel()
        await asyncio.sleep(0.3)  # for the file that is being decoded
        start = time.process_time()
        await asyncio.sleep(1)
        assert time.process_time() - start < 0.2  # nearly 1 where the thread goes on
        job.cancel()

    run(test)


def test_pixels_of_a_request_are_bounded_before_decoding() -> None:
    async def test(pool: DecodePool) -> None:
        await decode(pool, [LARGE] * 2)
        with pytest.raises(TooLarge, match="4500000 pixels; at most 3000000"):
            await decode(pool, [LARGE] * 3)

    run(test, max_request_pixels=3_000_000)


def test_work_that_cannot_end_in_time_is_refused() -> None:
    async def test(pool: DecodePool) -> None:
        backlog = [asyncio.create_task(decode(pool, [LARGE] * 100)) for _ in range(3)]  # type: ignore[arg-type]
        await asyncio.sleep(0.3)
        with pytest.raises(QueueFull) as refusal:
            await decode(pool, [LARGE], timeout_s=1)
        assert refusal.value.retry_after_s is not None
        assert refusal.value.retry_after_s >= 1
        for task in backlog:
            task.cancel()

    run(test)
