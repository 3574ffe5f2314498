"""Gathers what waits into batches for one worker thread. Knows neither HTTP nor images nor torch.

While the worker is busy, what arrives gathers; when it is free, it takes what is there, oldest first, at once. There
is no window to wait for. A request's items may be spread over several batches and share them with other requests.
"""

import asyncio
import logging
import threading
import time
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Sequence
from math import ceil
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

    def __init__(self, items: Sequence[Item], future: "asyncio.Future[Answer[Result]]") -> None:
        self.items = items
        self.future = future
        self.taken = 0
        self.results: dict[int, Result] = {}
        self.error: Exception | None = None
        self.submitted = time.monotonic()
        self.queue_s = 0.0
        self.run_s = 0.0
        self.abandoned = False

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
            results = [self.results[i] for i in range(len(self.items))]
            self.future.set_result(Answer(results, self.queue_s, self.run_s))


Place = tuple[Ticket[Item, Result], int]


class Batcher(Generic[Item, Result]):
    """A bounded queue before one thread that calls `run` with as many items as the largest of `sizes` that waits.

    `run` must give one result per item. When it raises, the batch is halved until only the guilty items fail.
    `on_batch(size, seconds)` is told of each pass.
    """

    def __init__(
        self,
        run: Callable[[Sequence[Item]], Sequence[Result]],
        sizes: Sequence[int],
        max_queue: int,
        on_batch: Callable[[int, float], None] = lambda size, seconds: None,
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
        self._thread = threading.Thread(target=self._work, name="inference", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Items in the queue, those in the running batch not counted."""
        return self._waiting

    async def submit(self, items: Sequence[Item], timeout_s: float) -> Answer[Result]:
        """Queues the items and waits for all results.

        Raises QueueFull when there is no room for all of them, NotReady after `close`, DeadlineExceeded after
        timeout_s seconds, or what `run` raised for one of them. A request that stops waiting leaves the queue.
        """
        loop = asyncio.get_running_loop()
        ticket: Ticket[Item, Result] = Ticket(items, loop.create_future())
        self._enqueue(ticket)
        try:
            async with asyncio.timeout(timeout_s):
                return await ticket.future
        except TimeoutError:
            raise DeadlineExceeded(f"No answer within {timeout_s:g} s.") from None
        finally:
            if not ticket.done:
                self._abandon(ticket)

    def close(self, wait_s: float = 0.0) -> None:
        """Ends the thread once the queue is empty, or after wait_s seconds; what still waits gets NotReady."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join(wait_s)
        with self._changed:
            left, self._waiting = list(self._tickets), 0
            self._tickets.clear()
        for ticket in left:
            ticket.error = NotReady("The service stopped before this was answered.", retry_after_s=1)
            ticket.future.get_loop().call_soon_threadsafe(ticket.settle)

    def _enqueue(self, ticket: Ticket[Item, Result]) -> None:
        count = len(ticket.items)
        with self._changed:
            if self._closed:
                raise NotReady("The service is shutting down.", retry_after_s=1)
            if self._waiting + count > self._max_queue:
                raise QueueFull(f"{self._waiting} images are waiting; there is no room.", self._seconds_of_work())
            self._tickets.append(ticket)
            self._waiting += count
            self._changed.notify()

    def _seconds_of_work(self) -> int:
        """Whole seconds, at least 1, until what waits now will have been answered at the measured rate."""
        return max(1, ceil(self._waiting / self._items_per_s)) if self._items_per_s else 1

    def _abandon(self, ticket: Ticket[Item, Result]) -> None:
        with self._changed:
            ticket.abandoned = True
            if ticket in self._tickets:
                self._tickets.remove(ticket)
                self._waiting -= len(ticket.items) - ticket.taken

    def _work(self) -> None:
        while batch := self._take():
            begun = time.monotonic()
            self._answer(batch)
            seconds = time.monotonic() - begun
            self._measure(len(batch), seconds)
            self._settle(batch, seconds)

    def _take(self) -> list[Place[Item, Result]]:
        """The oldest waiting items, as many as the largest size that they fill; empty once closed and drained."""
        batch: list[Place[Item, Result]] = []
        with self._changed:
            while not self._tickets and not self._closed:
                self._changed.wait()
            now = time.monotonic()
            size = self._sizes[max(0, bisect_right(self._sizes, self._waiting) - 1)]
            while self._tickets and len(batch) < size:
                ticket = self._tickets[0]
                if ticket.taken == 0:
                    ticket.queue_s = now - ticket.submitted
                end = min(len(ticket.items), ticket.taken + size - len(batch))
                batch += ((ticket, i) for i in range(ticket.taken, end))
                self._waiting -= end - ticket.taken
                ticket.taken = end
                if end == len(ticket.items):
                    self._tickets.popleft()
        return batch

    def _answer(self, batch: list[Place[Item, Result]]) -> None:
        try:
            results = self._run([ticket.items[i] for ticket, i in batch])
            if len(results) != len(batch):
                raise RuntimeError(f"{len(results)} results for {len(batch)} items")
        except Exception as error:
            if len(batch) == 1:
                logger.exception("an item failed in the model")
                batch[0][0].error = error
                return
            middle = len(batch) // 2
            self._answer(batch[:middle])
            self._answer(batch[middle:])
        else:
            for (ticket, i), result in zip(batch, results, strict=True):
                ticket.results[i] = result

    def _measure(self, count: int, seconds: float) -> None:
        rate = count / max(seconds, 1e-6)
        self._items_per_s = 0.8 * self._items_per_s + 0.2 * rate if self._items_per_s else rate
        self._on_batch(count, seconds)

    def _settle(self, batch: list[Place[Item, Result]], seconds: float) -> None:
        finished: list[Ticket[Item, Result]] = []
        for ticket in {id(ticket): ticket for ticket, _ in batch}.values():
            ticket.run_s += seconds
            if ticket.error is not None:
                self._abandon(ticket)
            if (ticket.done and not ticket.abandoned) or ticket.error is not None:
                finished.append(ticket)
        for loop in {ticket.future.get_loop() for ticket in finished}:
            mine = [ticket for ticket in finished if ticket.future.get_loop() is loop]
            loop.call_soon_threadsafe(_settle_all, mine)


def _settle_all(tickets: list[Ticket[Item, Result]]) -> None:
    for ticket in tickets:
        ticket.settle()
