import asyncio
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.errors import DeviceLostError, NotReady, QueueFull
from app.inference.batcher import Batcher
from app.inference.bisection import batch_sizes
from app.inference.model import Model
from app.inference.queue import BatchResult, RequestQueue


class Recorder:
    """Stands in for the model: doubles numbers, remembers its batches, waits where told to, fails on some."""

    def __init__(self, bad: frozenset[int] = frozenset()) -> None:
        self.batches: list[list[int]] = []
        self.bad = bad
        self.free = threading.Event()
        self.free.set()
        self.entered = threading.Event()
        self.most = 0  # calls at once
        self.verified = 0
        self._running: list[bool] = []
        self._lock = threading.Lock()

    def verify(self) -> None:
        self.verified += 1

    def __call__(self, items: Sequence[int], exclusive: bool) -> list[int]:
        self.entered.set()
        with self._lock:
            self._running.append(exclusive)
            self.most = max(self.most, len(self._running))
            assert self._running.count(True) <= 1
        self.free.wait(10)
        self.batches.append(list(items))
        with self._lock:
            self._running.remove(exclusive)
        if self.bad & set(items):
            raise ValueError("bad item")
        return [2 * item for item in items]


async def submit(
    batcher: Batcher[int, int], model: Model[int, int], items: Sequence[int], timeout_s: float = 10
) -> BatchResult[int]:
    with batcher.queue.reserve(len(items)) as reservation:
        async with asyncio.timeout(timeout_s):
            return await batcher.submit(model, items, reservation)


class Running:
    def __init__(
        self,
        max_batch: int = 8,
        max_queue: int = 64,
        sizes: Sequence[int] = (),
        streams: int = 1,
        merges_calls: bool = False,
    ) -> None:
        queue: RequestQueue[int, int] = RequestQueue(max_queue)
        self.batcher = Batcher(sizes or range(1, max_batch + 1), queue, streams, merges_calls=merges_calls)

    def __enter__(self) -> Batcher[int, int]:
        self.batcher.start()
        return self.batcher

    def __exit__(self, *exc: object) -> None:
        self.batcher.close(5)


@settings(deadline=None, max_examples=60)
@given(
    requests=st.lists(st.tuples(st.integers(1, 12), st.integers(0, 3)), min_size=1, max_size=20),
    max_batch=st.integers(1, 9),
    streams=st.integers(1, 3),
)
def test_every_item_gets_its_own_result(requests: list[tuple[int, int]], max_batch: int, streams: int) -> None:
    model = Recorder()
    numbers = iter(range(10_000))
    work = [([next(numbers) for _ in range(count)], pause) for count, pause in requests]

    async def send(batcher: Batcher[int, int], items: list[int], pause: int) -> None:
        await asyncio.sleep(pause / 1000)
        answer = await submit(batcher, model, items, 10)
        assert answer.results == [2 * item for item in items]
        assert answer.queue_s >= 0
        assert answer.inference_s > 0

    async def main() -> None:
        with Running(max_batch, max_queue=1000, streams=streams) as batcher:
            await asyncio.gather(*(send(batcher, items, pause) for items, pause in work))
            assert batcher.queue.waiting == 0

    asyncio.run(main())
    assert sorted(item for batch in model.batches for item in batch) == [i for items, _ in work for i in items]
    assert all(1 <= len(batch) <= max_batch for batch in model.batches)


@settings(deadline=None, max_examples=60)
@given(
    sizes=st.lists(st.integers(1, 6), min_size=1, max_size=12),
    bad=st.frozensets(st.integers(0, 30), max_size=5),
    left=st.frozensets(st.integers(0, 11), max_size=4),
    streams=st.integers(1, 3),
)
def test_only_failing_items_fail_and_cancelled_leave(
    sizes: list[int], bad: frozenset[int], left: frozenset[int], streams: int
) -> None:
    model = Recorder(bad)
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    work = [list(range(start, start + size)) for start, size in zip(starts, sizes, strict=True)]

    async def main() -> None:
        with Running(8, 1000, streams=streams) as batcher:
            model.free.clear()
            tasks = [asyncio.create_task(submit(batcher, model, items, 10)) for items in work]
            await asyncio.sleep(0.002)
            for i in left & set(range(len(tasks))):
                tasks[i].cancel()
            await asyncio.sleep(0)
            model.free.set()
            outcomes = await asyncio.gather(*tasks, return_exceptions=True)
            assert batcher.queue.waiting == 0
        for i, (items, outcome) in enumerate(zip(work, outcomes, strict=True)):
            if i in left:
                assert isinstance(outcome, asyncio.CancelledError)
            elif bad & set(items):
                assert isinstance(outcome, ValueError)
            else:
                assert outcome.results == [2 * item for item in items]

    asyncio.run(main())


def test_requests_during_a_batch_form_the_next_one() -> None:
    model = Recorder()

    async def main() -> None:
        with Running() as batcher:
            model.free.clear()
            first = asyncio.create_task(submit(batcher, model, [0], 10))
            await asyncio.to_thread(model.entered.wait, 5)
            others = [asyncio.create_task(submit(batcher, model, [i], 10)) for i in range(1, 6)]
            await asyncio.sleep(0.01)
            assert batcher.queue.waiting == 5
            model.free.set()
            await asyncio.gather(first, *others)

    asyncio.run(main())
    assert model.batches == [[0], [1, 2, 3, 4, 5]]


def test_large_request_shares_batches_in_turns() -> None:
    model = Recorder()

    async def main() -> None:
        with Running(max_batch=4) as batcher:
            model.free.clear()
            first = asyncio.create_task(submit(batcher, model, [0], 10))
            await asyncio.to_thread(model.entered.wait, 5)
            large = asyncio.create_task(submit(batcher, model, [1, 2, 3, 4, 5, 6], 10))
            small = asyncio.create_task(submit(batcher, model, [7], 10))
            await asyncio.sleep(0.01)
            model.free.set()
            await asyncio.gather(first, large, small)

    asyncio.run(main())
    assert model.batches == [[0], [1, 2, 3, 7], [4, 5, 6]]


def test_second_worker_runs_full_batches_only() -> None:
    model = Recorder()

    async def main() -> None:
        with Running(max_batch=4, streams=2) as batcher:
            model.free.clear()
            request = asyncio.create_task(submit(batcher, model, list(range(11)), 10))
            while model.most < 2:
                await asyncio.sleep(0.001)
            assert batcher.queue.waiting == 3
            model.free.set()
            assert (await request).results == [2 * i for i in range(11)]

    asyncio.run(main())
    assert sorted(model.batches) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10]]


def test_second_worker_matches_the_first_if_calls_are_merged() -> None:
    model = Recorder()

    async def main() -> None:
        with Running(max_batch=8, streams=2, merges_calls=True) as batcher:
            model.free.clear()
            first = asyncio.create_task(submit(batcher, model, [0, 1], 10))
            await asyncio.to_thread(model.entered.wait, 5)
            second = asyncio.create_task(submit(batcher, model, [2], 10))
            await asyncio.sleep(0.05)
            assert model.most == 1
            third = asyncio.create_task(submit(batcher, model, [3], 10))
            while model.most < 2:
                await asyncio.sleep(0.001)
            model.free.set()
            await asyncio.gather(first, second, third)

    asyncio.run(main())
    assert sorted(model.batches) == [[0, 1], [2, 3]]


def test_batches_have_prepared_sizes_only() -> None:
    model = Recorder()

    async def main() -> None:
        with Running(sizes=[1, 2, 4, 6]) as batcher:
            model.free.clear()
            first = asyncio.create_task(submit(batcher, model, [0], 10))
            await asyncio.to_thread(model.entered.wait, 5)
            rest = asyncio.create_task(submit(batcher, model, list(range(1, 12)), 10))
            await asyncio.sleep(0.01)
            model.free.set()
            await asyncio.gather(first, rest)

    asyncio.run(main())
    assert [len(batch) for batch in model.batches] == [1, 6, 4, 1]


@pytest.mark.parametrize("largest", [1, 2, 3, 5, 16, 48, 64, 100])
def test_batch_sizes_grow_by_half_at_most(largest: int) -> None:
    sizes = batch_sizes(largest)
    assert sizes[0] == 1
    assert sizes[-1] == largest
    assert all(small < large <= max(small + 1, 1.5 * small) for small, large in pairwise(sizes))


def test_full_queue_refuses_with_retry_after() -> None:
    model = Recorder()

    async def main() -> None:
        with Running(max_queue=4) as batcher:
            model.free.clear()
            running = asyncio.create_task(submit(batcher, model, [0], 10))
            await asyncio.to_thread(model.entered.wait, 5)
            waiting = asyncio.create_task(submit(batcher, model, [1, 2, 3], 10))
            await asyncio.sleep(0.01)
            with pytest.raises(QueueFull) as refusal:
                await submit(batcher, model, [4, 5], 10)
            assert refusal.value.retry_after_s is not None
            assert refusal.value.retry_after_s >= 1
            fits = asyncio.create_task(submit(batcher, model, [6], 10))
            await asyncio.sleep(0.01)
            model.free.set()
            await asyncio.gather(running, waiting, fits)

    asyncio.run(main())


def test_request_past_deadline_leaves_the_queue() -> None:
    model = Recorder()

    async def main() -> None:
        with Running() as batcher:
            model.free.clear()
            running = asyncio.create_task(submit(batcher, model, [0], 10))
            await asyncio.to_thread(model.entered.wait, 5)
            with pytest.raises(TimeoutError):
                await submit(batcher, model, [1, 2, 3], 0.02)
            assert batcher.queue.waiting == 0
            model.free.set()
            await running

    asyncio.run(main())
    assert model.batches == [[0]]


def test_close_answers_what_waits_then_refuses() -> None:
    model = Recorder()

    async def main() -> None:
        with Running() as batcher:
            model.free.clear()
            tasks = [asyncio.create_task(submit(batcher, model, [i], 10)) for i in range(20)]
            await asyncio.to_thread(model.entered.wait, 5)
            threading.Timer(0.05, model.free.set).start()
            await asyncio.to_thread(batcher.close, 5)
            assert [answer.results for answer in await asyncio.gather(*tasks)] == [[2 * i] for i in range(20)]
            with pytest.raises(NotReady):
                await submit(batcher, model, [1], 10)

    asyncio.run(main())


def test_close_does_not_wait_for_a_stalled_model() -> None:
    model = Recorder()

    async def main() -> None:
        with Running(max_batch=1) as batcher:
            model.free.clear()
            tasks = [asyncio.create_task(submit(batcher, model, [i], 10)) for i in range(3)]
            await asyncio.to_thread(model.entered.wait, 5)
            begun = time.monotonic()
            await asyncio.to_thread(batcher.close, 0.1)
            assert time.monotonic() - begun < 5
            outcomes = await asyncio.gather(*tasks[1:], return_exceptions=True)
            assert all(isinstance(outcome, NotReady) for outcome in outcomes)
            model.free.set()
            await tasks[0]

    asyncio.run(main())


class Stub:
    """A model that calls the given functions."""

    def __init__(self, run: Callable[[Sequence[int], bool], list[int]], verify: Callable[[], None]) -> None:
        self._run = run
        self._verify = verify

    def __call__(self, items: Sequence[int], exclusive: bool) -> list[int]:
        return self._run(items, exclusive)

    def verify(self) -> None:
        self._verify()


def test_wrong_number_of_results_is_an_error() -> None:
    model = Stub(lambda items, exclusive: [1, 2, 3], lambda: None)

    async def main() -> None:
        with Running(sizes=[4]) as batcher, pytest.raises(RuntimeError, match="3 results for 1"):
            await submit(batcher, model, [1], 5)

    asyncio.run(main())


def failing(batcher: Batcher[int, int], model: Model[int, int], error: type[Exception]) -> None:
    async def main() -> None:
        with pytest.raises(error):
            await submit(batcher, model, [1, 2])

    asyncio.run(main())


def test_lost_device_fails_the_batcher_without_bisection() -> None:
    calls = []

    def run(items: Sequence[int], exclusive: bool) -> list[int]:
        calls.append(len(items))
        raise DeviceLostError("an illegal memory access was encountered")

    model = Stub(run, lambda: None)
    with Running(sizes=[4]) as batcher:
        failing(batcher, model, NotReady)
        assert calls == [2]
        assert isinstance(batcher.failure, DeviceLostError)
        failing(batcher, model, NotReady)


def test_failing_verification_after_a_failed_batch_fails_the_batcher() -> None:
    def run(items: Sequence[int], exclusive: bool) -> list[int]:
        raise RuntimeError("unspecified launch failure")

    def verify() -> None:
        raise RuntimeError("unspecified launch failure")

    with Running(sizes=[4]) as batcher:
        failing(batcher, Stub(run, verify), NotReady)
        assert str(batcher.failure) == "unspecified launch failure"


def test_succeeding_verification_after_a_failed_batch_keeps_serving() -> None:
    model = Recorder(bad=frozenset({1, 2}))
    with Running(sizes=[4]) as batcher:
        failing(batcher, model, ValueError)
        assert asyncio.run(submit(batcher, model, [3])).results == [6]
        assert (batcher.failure, model.verified) == (None, 1)


@given(
    requests=st.lists(st.tuples(st.integers(0, 2), st.integers(1, 7)), min_size=1, max_size=15),
    bad=st.frozensets(st.integers(0, 40), max_size=3),
    streams=st.integers(1, 3),
)
def test_each_request_runs_on_its_own_model(requests: list[tuple[int, int]], bad: frozenset[int], streams: int) -> None:
    """Every batch of a model has a prepared size, or is the rest of one, and no item of another model's request."""
    models = [Recorder(bad) for _ in range(3)]
    numbers = iter(range(1000))
    work = [(models[index], [next(numbers) for _ in range(count)]) for index, count in requests]

    async def main() -> None:
        with Running(sizes=[1, 2, 4, 6], max_queue=1000, streams=streams) as batcher:
            sent = [submit(batcher, model, items, 10) for model, items in work]
            outcomes = await asyncio.gather(*sent, return_exceptions=True)
        for (_, items), outcome in zip(work, outcomes, strict=True):
            if bad & set(items):
                assert isinstance(outcome, ValueError)
            else:
                assert outcome.results == [2 * item for item in items]

    asyncio.run(main())
    for model in models:
        own = {item for owner, items in work if owner is model for item in items}
        assert {item for batch in model.batches for item in batch} <= own
        assert {len(batch) for batch in model.batches} <= {1, 2, 4, 6}


def test_a_single_image_beside_a_large_request_gets_a_short_batch() -> None:
    model = Recorder()

    async def send(batcher: Batcher[int, int], caller: str, items: list[int]) -> None:
        with batcher.queue.reserve(len(items), caller) as reservation:
            await batcher.submit(model, items, reservation)

    async def main() -> None:
        with Running(sizes=[1, 8, 16, 64], max_queue=1000) as batcher:
            model.free.clear()
            first = asyncio.create_task(send(batcher, "large", [0]))
            await asyncio.to_thread(model.entered.wait, 5)
            large = asyncio.create_task(send(batcher, "large", list(range(1, 129))))
            lone = asyncio.create_task(send(batcher, "lone", [1000]))
            await asyncio.sleep(0.02)
            model.free.set()
            await asyncio.gather(first, large, lone)

    asyncio.run(main())
    assert [len(batch) for batch in model.batches] == [1, 16, 64, 16, 16, 16, 1]
    assert 1000 in model.batches[1]


def test_an_idle_worker_keeps_no_reference_to_a_model() -> None:
    async def main() -> None:
        with Running() as batcher:
            model = Recorder()
            await submit(batcher, model, [1, 2, 3])
            reference = weakref.ref(model)
            del model
            while reference() is not None:
                await asyncio.sleep(0.001)

    asyncio.run(asyncio.wait_for(main(), 30))
