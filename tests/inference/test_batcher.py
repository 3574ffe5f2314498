import asyncio
import threading
import time
from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.errors import DeadlineExceeded, NotReady, QueueFull
from app.inference.batcher import Batcher, batch_sizes


class Recorder:
    """Stands in for the model: doubles numbers, remembers its batches, waits where told to, fails on some."""

    def __init__(self, bad: frozenset[int] = frozenset()) -> None:
        self.batches: list[list[int]] = []
        self.bad = bad
        self.free = threading.Event()
        self.free.set()
        self.entered = threading.Event()
        self.most = 0  # calls at once
        self._running: list[bool] = []
        self._lock = threading.Lock()

    def __call__(self, items: Sequence[int], alone: bool) -> list[int]:
        self.entered.set()
        with self._lock:
            self._running.append(alone)
            self.most = max(self.most, len(self._running))
            assert self._running.count(True) <= 1
        self.free.wait(10)
        self.batches.append(list(items))
        with self._lock:
            self._running.remove(alone)
        if self.bad & set(items):
            raise ValueError("bad item")
        return [2 * item for item in items]


class Running:
    def __init__(
        self, model: Recorder, max_batch: int = 8, max_queue: int = 64, sizes: Sequence[int] = (), lanes: int = 1
    ) -> None:
        self.batcher: Batcher[int, int] = Batcher(model, sizes or range(1, max_batch + 1), max_queue, lanes=lanes)

    def __enter__(self) -> Batcher[int, int]:
        self.batcher.start()
        return self.batcher

    def __exit__(self, *exc: object) -> None:
        self.batcher.close(5)


@settings(deadline=None, max_examples=60)
@given(
    requests=st.lists(st.tuples(st.integers(1, 12), st.integers(0, 3)), min_size=1, max_size=20),
    max_batch=st.integers(1, 9),
    lanes=st.integers(1, 3),
)
def test_each_item_is_answered_once_in_its_place(requests: list[tuple[int, int]], max_batch: int, lanes: int) -> None:
    model = Recorder()
    numbers = iter(range(10_000))
    work = [([next(numbers) for _ in range(count)], pause) for count, pause in requests]

    async def send(batcher: Batcher[int, int], items: list[int], pause: int) -> None:
        await asyncio.sleep(pause / 1000)
        answer = await batcher.submit(items, 10)
        assert answer.results == [2 * item for item in items]
        assert answer.queue_s >= 0
        assert answer.run_s > 0

    async def main() -> None:
        with Running(model, max_batch, max_queue=1000, lanes=lanes) as batcher:
            await asyncio.gather(*(send(batcher, items, pause) for items, pause in work))
            assert batcher.waiting == 0

    asyncio.run(main())
    assert sorted(item for batch in model.batches for item in batch) == [i for items, _ in work for i in items]
    assert all(1 <= len(batch) <= max_batch for batch in model.batches)


@settings(deadline=None, max_examples=60)
@given(
    sizes=st.lists(st.integers(1, 6), min_size=1, max_size=12),
    bad=st.frozensets(st.integers(0, 30), max_size=5),
    left=st.frozensets(st.integers(0, 11), max_size=4),
    lanes=st.integers(1, 3),
)
def test_only_the_guilty_fail_and_only_the_gone_go_unanswered(
    sizes: list[int], bad: frozenset[int], left: frozenset[int], lanes: int
) -> None:
    model = Recorder(bad)
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    work = [list(range(start, start + size)) for start, size in zip(starts, sizes, strict=True)]

    async def main() -> None:
        with Running(model, 8, 1000, lanes=lanes) as batcher:
            model.free.clear()
            tasks = [asyncio.create_task(batcher.submit(items, 10)) for items in work]
            await asyncio.sleep(0.002)
            for i in left & set(range(len(tasks))):
                tasks[i].cancel()
            await asyncio.sleep(0)
            model.free.set()
            outcomes = await asyncio.gather(*tasks, return_exceptions=True)
            assert batcher.waiting == 0
        for i, (items, outcome) in enumerate(zip(work, outcomes, strict=True)):
            if i in left:
                assert isinstance(outcome, asyncio.CancelledError)
            elif bad & set(items):
                assert isinstance(outcome, ValueError)
            else:
                assert outcome.results == [2 * item for item in items]

    asyncio.run(main())


def test_what_gathers_while_the_model_works_runs_together() -> None:
    model = Recorder()

    async def main() -> None:
        with Running(model) as batcher:
            model.free.clear()
            first = asyncio.create_task(batcher.submit([0], 10))
            await asyncio.to_thread(model.entered.wait, 5)
            others = [asyncio.create_task(batcher.submit([i], 10)) for i in range(1, 6)]
            await asyncio.sleep(0.01)
            assert batcher.waiting == 5
            model.free.set()
            await asyncio.gather(first, *others)

    asyncio.run(main())
    assert model.batches == [[0], [1, 2, 3, 4, 5]]


def test_a_large_request_is_split_and_shares_its_last_batch() -> None:
    model = Recorder()

    async def main() -> None:
        with Running(model, max_batch=4) as batcher:
            model.free.clear()
            first = asyncio.create_task(batcher.submit([0], 10))
            await asyncio.to_thread(model.entered.wait, 5)
            large = asyncio.create_task(batcher.submit([1, 2, 3, 4, 5, 6], 10))
            small = asyncio.create_task(batcher.submit([7], 10))
            await asyncio.sleep(0.01)
            model.free.set()
            await asyncio.gather(first, large, small)

    asyncio.run(main())
    assert model.batches == [[0], [1, 2, 3, 4], [5, 6, 7]]


def test_a_second_worker_takes_full_batches_only() -> None:
    model = Recorder()

    async def main() -> None:
        with Running(model, max_batch=4, lanes=2) as batcher:
            model.free.clear()
            request = asyncio.create_task(batcher.submit(list(range(11)), 10))
            while model.most < 2:
                await asyncio.sleep(0.001)
            assert batcher.waiting == 3
            model.free.set()
            assert (await request).results == [2 * i for i in range(11)]

    asyncio.run(main())
    assert sorted(model.batches) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10]]


def test_batches_have_only_the_sizes_that_are_prepared() -> None:
    model = Recorder()

    async def main() -> None:
        with Running(model, sizes=[1, 2, 4, 6]) as batcher:
            model.free.clear()
            first = asyncio.create_task(batcher.submit([0], 10))
            await asyncio.to_thread(model.entered.wait, 5)
            rest = asyncio.create_task(batcher.submit(list(range(1, 12)), 10))
            await asyncio.sleep(0.01)
            model.free.set()
            await asyncio.gather(first, rest)

    asyncio.run(main())
    assert [len(batch) for batch in model.batches] == [1, 6, 4, 1]


@pytest.mark.parametrize("largest", [1, 2, 3, 5, 16, 48, 64, 100])
def test_batch_sizes_reach_from_one_to_the_largest_in_steps_of_a_half_at_most(largest: int) -> None:
    sizes = batch_sizes(largest)
    assert sizes[0] == 1
    assert sizes[-1] == largest
    assert all(small < large <= max(small + 1, 1.5 * small) for small, large in pairwise(sizes))


def test_a_full_queue_refuses_at_once_and_says_when_to_come_back() -> None:
    model = Recorder()

    async def main() -> None:
        with Running(model, max_queue=4) as batcher:
            model.free.clear()
            running = asyncio.create_task(batcher.submit([0], 10))
            await asyncio.to_thread(model.entered.wait, 5)
            waiting = asyncio.create_task(batcher.submit([1, 2, 3], 10))
            await asyncio.sleep(0.01)
            with pytest.raises(QueueFull) as refusal:
                await batcher.submit([4, 5], 10)
            assert refusal.value.retry_after_s is not None
            assert refusal.value.retry_after_s >= 1
            fits = asyncio.create_task(batcher.submit([6], 10))
            await asyncio.sleep(0.01)
            model.free.set()
            await asyncio.gather(running, waiting, fits)

    asyncio.run(main())


def test_a_request_out_of_time_leaves_the_queue_and_costs_nothing() -> None:
    model = Recorder()

    async def main() -> None:
        with Running(model) as batcher:
            model.free.clear()
            running = asyncio.create_task(batcher.submit([0], 10))
            await asyncio.to_thread(model.entered.wait, 5)
            with pytest.raises(DeadlineExceeded):
                await batcher.submit([1, 2, 3], 0.02)
            assert batcher.waiting == 0
            model.free.set()
            await running

    asyncio.run(main())
    assert model.batches == [[0]]


def test_closing_answers_what_waits_then_refuses() -> None:
    model = Recorder()

    async def main() -> None:
        with Running(model) as batcher:
            model.free.clear()
            tasks = [asyncio.create_task(batcher.submit([i], 10)) for i in range(20)]
            await asyncio.to_thread(model.entered.wait, 5)
            threading.Timer(0.05, model.free.set).start()
            await asyncio.to_thread(batcher.close, 5)
            assert [answer.results for answer in await asyncio.gather(*tasks)] == [[2 * i] for i in range(20)]
            with pytest.raises(NotReady):
                await batcher.submit([1], 10)

    asyncio.run(main())


def test_closing_gives_up_on_a_model_that_hangs() -> None:
    model = Recorder()

    async def main() -> None:
        with Running(model, max_batch=1) as batcher:
            model.free.clear()
            tasks = [asyncio.create_task(batcher.submit([i], 10)) for i in range(3)]
            await asyncio.to_thread(model.entered.wait, 5)
            begun = time.monotonic()
            await asyncio.to_thread(batcher.close, 0.1)
            assert time.monotonic() - begun < 5
            outcomes = await asyncio.gather(*tasks[1:], return_exceptions=True)
            assert all(isinstance(outcome, NotReady) for outcome in outcomes)
            model.free.set()
            await tasks[0]

    asyncio.run(main())


def test_a_model_that_miscounts_is_an_error() -> None:
    async def main() -> None:
        batcher: Batcher[int, int] = Batcher(lambda items, alone: [1, 2, 3], sizes=[4], max_queue=4)
        batcher.start()
        with pytest.raises(RuntimeError, match="3 results for 1"):
            await batcher.submit([1], 5)
        batcher.close(5)

    asyncio.run(main())


def test_what_has_waited_once_goes_ahead_whether_there_is_room_or_not() -> None:
    model = Recorder()

    async def scenario(batcher: Batcher[int, int]) -> list[list[int]]:
        model.free.clear()
        running = asyncio.create_task(batcher.submit([1], 10))
        while not model.entered.is_set():
            await asyncio.sleep(0.001)
        waiting = asyncio.create_task(batcher.submit([2, 3], 10))
        await asyncio.sleep(0)
        with pytest.raises(QueueFull):
            await batcher.submit([4], 10)
        again = [asyncio.create_task(batcher.submit([item], 10, again=True)) for item in (5, 6)]
        await asyncio.sleep(0)
        assert batcher.waiting == 4
        model.free.set()
        answers = [(await task).results for task in (running, waiting, *again)]
        assert batcher.waiting == 0
        return answers

    with Running(model, max_batch=1, max_queue=2) as batcher:
        assert asyncio.run(scenario(batcher)) == [[2], [4, 6], [10], [12]]
        batcher.close(5)
        with pytest.raises(NotReady):
            asyncio.run(batcher.submit([7], 10, again=True))
    assert [batch[0] for batch in model.batches] == [1, 6, 5, 2, 3]
