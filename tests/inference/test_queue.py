"""The queue as a state machine: bounds, turns, order and cancellation."""

import asyncio
from collections import Counter
from collections.abc import Iterator, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from app.errors import NotReady, QueueFull
from app.inference.queue import PendingRequest, RequestQueue, Reservation

LIMIT, CALLER_LIMIT, SMALL_LIMIT = 12, 8, 2


class Model:
    """The queue does not call it."""

    def __call__(self, items: Sequence[int], exclusive: bool) -> list[int]:
        raise NotImplementedError

    def verify(self) -> None:
        raise NotImplementedError


MODEL = Model()


@pytest.fixture(scope="module")
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    loop = asyncio.new_event_loop()
    yield loop
    loop.close()


def fill(queue: RequestQueue[int, int], caller: str, items: list[int], loop: asyncio.AbstractEventLoop) -> None:
    with queue.reserve(len(items), caller) as reservation:
        queue.put(PendingRequest(MODEL, items, caller, loop), reservation)


def take(queue: RequestQueue[int, int], count: int) -> list[int]:
    with queue.changed:
        return [item for part in queue.take(count) for item in part.items]


class QueueMachine(RuleBasedStateMachine):
    """Compares the queue with a model that counts reserved, waiting and taken images of each caller."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.queue: RequestQueue[int, int] = RequestQueue(LIMIT, CALLER_LIMIT, SMALL_LIMIT)
        self.reservations: list[Reservation] = []
        self.requests: list[PendingRequest[int, int]] = []

    def teardown(self) -> None:
        self.loop.close()

    def held(self, caller: str) -> int:
        reserved = sum(each.count for each in self.reservations if each.caller == caller)
        return reserved + sum(len(each.items) - each.dispatched for each in self.requests if each.caller == caller)

    @property
    def size(self) -> int:
        return sum(self.held(caller) for caller in "abc")

    @rule(count=st.integers(1, 6), caller=st.sampled_from("abc"))
    def reserve(self, count: int, caller: str) -> None:
        held = self.held(caller) + count
        limit = LIMIT if held <= SMALL_LIMIT else LIMIT - SMALL_LIMIT
        fits = self.size + count <= limit and held <= CALLER_LIMIT
        if fits:
            self.reservations.append(self.queue.reserve(count, caller))
            return
        with pytest.raises(QueueFull) as refusal:
            self.queue.reserve(count, caller)
        assert refusal.value.retry_after_s == 1

    @precondition(lambda self: self.reservations)
    @rule(data=st.data())
    def put(self, data: st.DataObject) -> None:
        """Some files of the reservation may have failed to decode."""
        reservation = self.reservations.pop(data.draw(st.integers(0, len(self.reservations) - 1)))
        count = data.draw(st.integers(0, reservation.count))
        with reservation:
            if count:
                request: PendingRequest[int, int] = PendingRequest(
                    MODEL, list(range(count)), reservation.caller, self.loop
                )
                self.queue.put(request, reservation)
                self.requests.append(request)

    @rule(count=st.integers(1, 8))
    def take(self, count: int) -> None:
        waiting = {request: len(request.items) - request.dispatched for request in self.requests}
        before = {request: request.dispatched for request in self.requests}
        with self.queue.changed:
            batch = self.queue.take(count)
        assert sum(len(part.indices) for part in batch) == min(count, sum(waiting.values()))
        for request, indices in batch:
            assert indices.start == before[request]
            assert indices.stop == request.dispatched
        taken = {request: request.dispatched - before[request] for request in self.requests}
        for caller in {request.caller for request in self.requests if waiting[request]}:
            own = [request for request in self.requests if request.caller == caller and waiting[request]]
            left = [request for request in own if request.dispatched < len(request.items)]
            if left:  # turns within a caller: no request is more than one image ahead of one that still waits
                assert max(taken[request] for request in own) <= min(taken[request] for request in left) + 1
        self.requests = [request for request in self.requests if request.dispatched < len(request.items)]

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        self.queue.remove(self.requests.pop(data.draw(st.integers(0, len(self.requests) - 1))))

    @invariant()
    def counts_agree(self) -> None:
        assert self.queue.size == self.size
        assert self.queue.waiting == sum(len(each.items) - each.dispatched for each in self.requests)


TestQueueMachine = QueueMachine.TestCase


@given(sizes=st.dictionaries(st.sampled_from("abcd"), st.integers(1, 20), min_size=2))
def test_callers_share_a_batch_equally(sizes: dict[str, int]) -> None:
    loop = asyncio.new_event_loop()
    queue: RequestQueue[str, int] = RequestQueue(1000)
    for caller, size in sizes.items():
        with queue.reserve(size, caller) as reservation:
            queue.put(PendingRequest(MODEL, [caller] * size, caller, loop), reservation)
    with queue.changed:
        shares = Counter(item for part in queue.take(16) for item in part.items)
    unsatisfied = [caller for caller, size in sizes.items() if shares[caller] < size]
    if unsatisfied:
        assert max(shares.values()) <= min(shares[caller] for caller in unsatisfied) + 1
    loop.close()


def test_single_image_passes_a_large_request(loop: asyncio.AbstractEventLoop) -> None:
    queue: RequestQueue[int, int] = RequestQueue(1000)
    fill(queue, "large", list(range(256)), loop)
    fill(queue, "small", [1000], loop)
    assert 1000 in take(queue, 4)


def test_requests_of_one_caller_take_turns(loop: asyncio.AbstractEventLoop) -> None:
    queue: RequestQueue[int, int] = RequestQueue(1000)
    fill(queue, "a", [0, 1, 2, 3], loop)
    fill(queue, "a", [10], loop)
    assert sorted(take(queue, 3)) == [0, 1, 10]
    assert take(queue, 9) == [2, 3]


def test_only_the_caller_over_its_share_is_refused(loop: asyncio.AbstractEventLoop) -> None:
    queue: RequestQueue[int, int] = RequestQueue(10, caller_limit=6)
    fill(queue, "a", [0] * 6, loop)
    with pytest.raises(QueueFull, match="one caller is 6"):
        queue.check(1, "a")
    queue.check(4, "b")


def test_large_callers_leave_room_for_small_ones(loop: asyncio.AbstractEventLoop) -> None:
    queue: RequestQueue[int, int] = RequestQueue(16, caller_limit=8, small_limit=2)
    fill(queue, "a", [0] * 8, loop)
    fill(queue, "b", [0] * 6, loop)
    with pytest.raises(QueueFull, match="the limit is 14"):
        queue.check(1, "b")
    with pytest.raises(QueueFull, match="the limit is 14"):
        queue.check(3, "c")
    fill(queue, "c", [0], loop)
    fill(queue, "d", [0], loop)
    with pytest.raises(QueueFull, match="the limit is 16"):
        queue.check(1, "e")


@given(
    callers=st.lists(st.lists(st.integers(1, 8), min_size=1, max_size=4), min_size=1, max_size=6),
    batch=st.integers(1, 8),
)
def test_nobody_starves_and_order_is_kept(callers: list[list[int]], batch: int) -> None:
    """While batches are taken, callers that keep the queue full delay a single image by one round of turns."""
    loop = asyncio.new_event_loop()
    queue: RequestQueue[tuple[int, int, int], int] = RequestQueue(10_000)
    for caller, sizes in enumerate(callers):
        for request, size in enumerate(sizes):
            fill(queue, str(caller), [(caller, request, index) for index in range(size)], loop)
    fill(queue, "lone", [(-1, 0, 0)], loop)
    served: list[tuple[int, int, int]] = []
    while queue.waiting:
        served += take(queue, batch)
    assert served.index((-1, 0, 0)) < len(callers) + batch
    for caller, sizes in enumerate(callers):
        for request, size in enumerate(sizes):
            own = [index for owner, number, index in served if (owner, number) == (caller, request)]
            assert own == list(range(size))
    loop.close()


@pytest.mark.parametrize(
    ("images", "expected"),
    [
        ({"a": 1}, False),
        ({"a": 1, "b": 4}, False),  # a large batch has no image too many
        ({"a": 1, "b": 256}, True),
        ({"a": 4, "b": 5, "c": 256}, True),
        ({"a": 5, "b": 256}, False),
        ({str(caller): 1 for caller in range(8)} | {"large": 256}, False),  # small batches would cost throughput
    ],
)
def test_a_caller_of_a_few_images_beside_a_large_one_is_found(
    images: dict[str, int], expected: bool, loop: asyncio.AbstractEventLoop
) -> None:
    queue: RequestQueue[int, int] = RequestQueue(1000)
    for caller, count in images.items():
        fill(queue, caller, list(range(count)), loop)
    assert queue.has_short_caller is expected


def test_closed_queue_refuses(loop: asyncio.AbstractEventLoop) -> None:
    queue: RequestQueue[int, int] = RequestQueue(4)
    reservation = queue.reserve(2)
    queue.closed = True
    with pytest.raises(NotReady), reservation:
        queue.put(PendingRequest(MODEL, [1, 2], "", loop), reservation)
    with pytest.raises(NotReady):
        queue.reserve(1)
    assert queue.size == 0


def test_estimated_wait_follows_the_measured_rate(loop: asyncio.AbstractEventLoop) -> None:
    queue: RequestQueue[int, int] = RequestQueue(1000)
    fill(queue, "a", [0] * 300, loop)
    assert queue.estimated_wait_s() == 1
    queue.observe_rate(100)
    assert queue.estimated_wait_s() == 3
    for _ in range(50):
        queue.observe_rate(10)
    assert queue.estimated_wait_s() == 30
