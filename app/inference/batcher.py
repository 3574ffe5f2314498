"""Gathers what waits into batches for a few worker threads. Knows neither HTTP nor images nor torch.

While a worker is busy, what arrives gathers; once it is free, it takes what is there, oldest first, at once. There is
no window to wait for. Where a full batch has gathered, another worker takes it meanwhile. A request's items may be
spread over several batches and share them with other requests.
"""

import asyncio
import logging
import threading
import time
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import islice
from math import ceil, inf
from typing import Generic, NamedTuple, TypeVar

from app.errors import DeadlineExceeded, NotReady, QueueFull

Item = TypeVar("Item")
Result = TypeVar("Result")

logger = logging.getLogger(__name__)


def batch_sizes(largest: int) -> list[int]:
    """1, 2, 3, 4, 6, 8, 12 and so on up to `largest`: few enough to prepare, dense enough to leave little waiting."""
    sizes = {2**k * part // 2 for k in range(largest.bit_length()) for part in (2, 3)}
    return sorted({size for size in sizes if size <= largest} | {largest})


class Answer(NamedTuple, Generic[Result]):
    """One result per submitted item, in order; seconds until the first batch began, and seconds of all batches."""

    results: list[Result]
    queue_s: float
    run_s: float


class Ticket(Generic[Item, Result]):
    """The place of one request in the queue."""

    def __init__(self, items: Sequence[Item], loop: asyncio.AbstractEventLoop) -> None:
        self.items = items
        self.loop = loop
        self.future: asyncio.Future[Answer[Result]] = loop.create_future()
        self.taken = 0  # items that have left the queue
        self.results: dict[int, Result] = {}  # by the item's place
        self.error: Exception | None = None
        self.submitted = time.monotonic()
        self.queue_s = 0.0
        self.run_s = 0.0

    @property
    def done(self) -> bool:
        return self.error is not None or len(self.results) == len(self.items)

    def settle(self) -> None:
        """Hands the answer to the waiting request; runs on the event loop."""
        if self.future.done():
            return
        if self.error is not None:
            self.future.set_exception(self.error)
        else:
            results = [self.results[place] for place in range(len(self.items))]
            self.future.set_result(Answer(results, self.queue_s, self.run_s))

    def expire(self, timeout_s: float) -> None:
        if not self.future.done():
            self.future.set_exception(DeadlineExceeded(f"No answer within {timeout_s:g} s."))


class Span(NamedTuple, Generic[Item, Result]):
    """Neighbouring items of one request in a batch."""

    ticket: Ticket[Item, Result]
    places: range

    @property
    def items(self) -> Sequence[Item]:
        return self.ticket.items[self.places.start : self.places.stop]


Batch = list[Span[Item, Result]]


class Pass(NamedTuple, Generic[Item, Result]):
    """A batch that a worker has taken; `alone` where no other worker had one."""

    batch: Batch[Item, Result]
    alone: bool
    begun: float


Outcome = tuple[Span[Item, Result], Sequence[Result] | Exception]


class Batcher(Generic[Item, Result]):
    """A bounded queue before `lanes` threads that call `run` with as many items as the largest of `sizes` that waits.

    `run(items, alone)` must give one result per item; `alone` says that no other thread is at it just now. When it
    raises, the batch is halved until only the guilty items fail. `on_batch(size, seconds)` is told of each pass, one
    after the other.
    """

    def __init__(
        self,
        run: Callable[[Sequence[Item], bool], Sequence[Result]],
        sizes: Sequence[int],
        max_queue: int,
        on_batch: Callable[[int, float], None] = lambda size, seconds: None,
        lanes: int = 1,
    ) -> None:
        self._run = run
        self._sizes = sorted(sizes)
        self._max_queue = max_queue
        self._on_batch = on_batch
        self._changed = threading.Condition()
        self._tickets: deque[Ticket[Item, Result]] = deque()
        self._waiting = 0
        self._items_per_s = 0.0
        self._closed = False
        self._running: dict[int, Pass[Item, Result]] = {}  # by lane
        self._threads = [
            threading.Thread(target=self._work, args=(lane,), name=f"inference-{lane}", daemon=True)
            for lane in range(lanes)
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    @property
    def waiting(self) -> int:
        """Items in the queue, those in the running batches not counted."""
        return self._waiting

    @property
    def alive(self) -> bool:
        return all(thread.is_alive() for thread in self._threads)

    @property
    def stalled_s(self) -> float:
        """Seconds that the longest running pass has taken so far, 0 between passes; infinity once a thread is gone."""
        if not self.alive:
            return inf
        with self._changed:
            begun = [each.begun for each in self._running.values()]
        return time.monotonic() - min(begun) if begun else 0.0

    async def submit(self, items: Sequence[Item], timeout_s: float, again: bool = False) -> Answer[Result]:
        """Queues the items and waits for all results.

        With `again`, for a request that has waited once, they go ahead of all others, whether there is room or not.

        Raises QueueFull when there is no room for all of them, NotReady after `close`, DeadlineExceeded after
        timeout_s seconds, or what `run` raised for one of them. A request that stops waiting leaves the queue.
        """
        loop = asyncio.get_running_loop()
        ticket: Ticket[Item, Result] = Ticket(items, loop)
        self._enqueue(ticket, again)
        timer = loop.call_later(timeout_s, ticket.expire, timeout_s)
        try:
            return await ticket.future
        finally:
            timer.cancel()
            if not ticket.done:
                self._withdraw(ticket)

    def close(self, wait_s: float = 0.0) -> None:
        """Ends the threads once the queue is empty, or after wait_s seconds; what still waits gets NotReady."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        deadline = time.monotonic() + wait_s
        for thread in self._threads:
            if thread.is_alive():
                thread.join(max(0.0, deadline - time.monotonic()))
        self._refuse(list(self._tickets))

    def fail(self) -> None:
        """Answers all that waits or runs with NotReady, and takes no more: for a thread that will not."""
        with self._changed:
            self._closed = True
            running = [span.ticket for each in self._running.values() for span in each.batch]
        self._refuse(running + list(self._tickets))

    def _refuse(self, tickets: list[Ticket[Item, Result]]) -> None:
        with self._changed:
            self._waiting = 0
            self._tickets.clear()
        for ticket in tickets:
            ticket.error = NotReady("The service stopped before this was answered.", retry_after_s=1)
        _hand_out(tickets)

    def check_room(self, count: int) -> None:
        """Raises what `submit` would raise for that many items now, before any work is put into them."""
        self._check_open()
        if self._waiting + count > self._max_queue:
            raise QueueFull(f"{self._waiting} images are waiting; there is no room.", self._seconds_of_work())

    def _check_open(self) -> None:
        if self._closed:
            raise NotReady("The service is shutting down.", retry_after_s=1)

    def _enqueue(self, ticket: Ticket[Item, Result], again: bool) -> None:
        count = len(ticket.items)
        with self._changed:
            if again:
                self._check_open()
                self._tickets.appendleft(ticket)
            else:
                self.check_room(count)
                self._tickets.append(ticket)
            self._waiting += count
            self._wake()

    def _seconds_of_work(self) -> int:
        """Whole seconds, at least 1, until what waits now will have been answered at the measured rate."""
        return max(1, ceil(self._waiting / self._items_per_s)) if self._items_per_s else 1

    def _withdraw(self, ticket: Ticket[Item, Result]) -> None:
        with self._changed:
            if ticket in self._tickets:
                self._tickets.remove(ticket)
                self._waiting -= len(ticket.items) - ticket.taken

    def _work(self, lane: int) -> None:
        while taken := self._take(lane):
            outcomes = self._answer(taken.batch, taken.alone)
            self._settle(lane, outcomes)

    def _take(self, lane: int) -> Pass[Item, Result] | None:
        """The oldest waiting items, as many as the largest size that they fill; none once closed and drained."""
        with self._changed:
            while not self._enough() and not self._closed:
                self._changed.wait()
            if not self._tickets:
                return None
            now = time.monotonic()
            room = self._sizes[max(0, bisect_right(self._sizes, self._waiting) - 1)]
            batch: Batch[Item, Result] = []
            while self._tickets and room:
                ticket = self._tickets[0]
                if ticket.taken == 0:
                    ticket.queue_s = now - ticket.submitted
                places = range(ticket.taken, min(ticket.taken + room, len(ticket.items)))
                ticket.taken += len(places)
                room -= len(places)
                self._waiting -= len(places)
                batch.append(Span(ticket, places))
                if ticket.taken == len(ticket.items):
                    self._tickets.popleft()
            self._running[lane] = taken = Pass(batch, not self._running, now)
            self._wake()
        return taken

    def _enough(self) -> bool:
        """Whether a free worker has something to take: beside others only a full batch, since small ones cost more."""
        return self._waiting >= (self._sizes[-1] if self._running else 1)

    def _wake(self) -> None:
        if self._enough():  # a worker woken for nothing would hold up the event loop
            self._changed.notify()

    def _answer(self, batch: Batch[Item, Result], alone: bool) -> list[Outcome[Item, Result]]:
        """Each span's results, or the error of one item that fails by itself."""
        items = [item for span in batch for item in span.items]
        try:
            results = self._run(items, alone)
            if len(results) != len(items):
                raise RuntimeError(f"{len(results)} results for {len(items)} items")
        except Exception as error:
            if len(items) == 1:
                logger.exception("an item failed in the model")
                return [(batch[0], error)]
            return [outcome for half in _halves(batch) for outcome in self._answer(half, alone)]
        row = iter(results)
        return [(span, list(islice(row, len(span.places)))) for span in batch]

    def _settle(self, lane: int, outcomes: list[Outcome[Item, Result]]) -> None:
        """Hands out what is complete, and learns the rate."""
        with self._changed:
            lanes = len(self._running)  # that shared the cores with this one
            batch, _, begun = self._running.pop(lane)
            seconds = time.monotonic() - begun
            count = sum(len(span.places) for span in batch)
            rate = lanes * count / max(seconds, 1e-6)
            self._items_per_s = 0.8 * self._items_per_s + 0.2 * rate if self._items_per_s else rate
            for span, outcome in outcomes:
                if isinstance(outcome, Exception):
                    span.ticket.error = outcome
                else:
                    span.ticket.results.update(zip(span.places, outcome, strict=True))
            for ticket, _ in batch:
                ticket.run_s += seconds
                if ticket.error is not None:
                    self._withdraw(ticket)
            self._on_batch(count, seconds)
            done = [ticket for ticket, _ in batch if ticket.done]
        _hand_out(done)


def _halves(batch: Batch[Item, Result]) -> tuple[Batch[Item, Result], Batch[Item, Result]]:
    """The batch in two, between requests where it has several, else within the one."""
    if len(batch) > 1:
        middle = len(batch) // 2
        return batch[:middle], batch[middle:]
    ((ticket, places),) = batch
    middle = len(places) // 2
    return [Span(ticket, places[:middle])], [Span(ticket, places[middle:])]


def _hand_out(tickets: Sequence[Ticket[Item, Result]]) -> None:
    """Settles the tickets on their event loops, in one call a loop."""
    for loop in {ticket.loop for ticket in tickets}:
        mine = [ticket for ticket in tickets if ticket.loop is loop]
        with suppress(RuntimeError):  # the loop has closed, and nobody waits any more
            loop.call_soon_threadsafe(_settle_all, mine)


def _settle_all(tickets: Sequence[Ticket[Item, Result]]) -> None:
    for ticket in tickets:
        ticket.settle()
