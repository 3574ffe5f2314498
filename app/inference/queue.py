"""The bounded queue before the network: reservations, fair turns, cancellation. Independent of HTTP and images.

A place is reserved before a request's images are decoded, and is given back when a batch takes the image. So the bound
counts all images that are decoded or wait. Batches are filled in turns: one image from each caller, and within a caller
one from each of its requests (deficit round robin with a quantum of one image; Shreedhar and Varghese 1995).
"""

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from math import ceil
from typing import Generic, NamedTuple, TypeVar

from app.errors import NotReady, QueueFull
from app.inference.model import Model
from app.inference.pending import Pending

Item = TypeVar("Item")
Result = TypeVar("Result")

FEW_CALLERS, FEW_IMAGES = 8, 4  # see `has_short_caller`
RATE_SMOOTHING = 0.2  # weight of the newest batch in the moving average of images/s


class BatchResult(NamedTuple, Generic[Result]):
    """One result per item, in order; seconds until the first batch started, and seconds of all its batches."""

    results: list[Result]
    queue_s: float
    inference_s: float


class PendingRequest(Pending[BatchResult[Result]], Generic[Item, Result]):
    """The items of one request that wait or run, on one model."""

    def __init__(
        self,
        model: Model[Item, Result],
        items: Sequence[Item],
        caller: str,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        super().__init__(loop)
        self.model = model
        self.items = items
        self.caller = caller
        self.dispatched = 0  # items that have left the queue
        self.results: dict[int, Result] = {}  # by index of the item
        self.submitted = time.monotonic()
        self.queue_s = 0.0
        self.inference_s = 0.0

    @property
    def done(self) -> bool:
        return self.error is not None or len(self.results) == len(self.items)

    def value(self) -> BatchResult[Result]:
        results = [self.results[index] for index in range(len(self.items))]
        return BatchResult(results, self.queue_s, self.inference_s)


class BatchSlice(NamedTuple, Generic[Item, Result]):
    """Consecutive items of one request in a batch."""

    request: PendingRequest[Item, Result]
    indices: range

    @property
    def items(self) -> Sequence[Item]:
        return self.request.items[self.indices.start : self.indices.stop]


Batch = list[BatchSlice[Item, Result]]


class Reservation:
    """Places in the queue for images that are not yet decoded. Leaving the `with` block gives back what is unused."""

    def __init__(self, release: Callable[[int, str], None], count: int, caller: str) -> None:
        self._release = release
        self.count = count
        self.caller = caller

    def __enter__(self) -> "Reservation":
        return self

    def __exit__(self, *exc: object) -> None:
        self._release(self.count, self.caller)
        self.count = 0


class RequestQueue(Generic[Item, Result]):
    """At most `limit` images are reserved or wait; one caller holds at most `caller_limit` of them.

    The last `small_limit` places are for callers that hold no more than so many: large callers leave room for others.
    `changed` guards all state and is notified when a worker may have work.
    """

    def __init__(self, limit: int, caller_limit: int | None = None, small_limit: int = 0) -> None:
        self.limit = limit
        self.small_limit = small_limit
        self.caller_limit = limit if caller_limit is None else caller_limit
        self.changed = threading.Condition()
        self.closed = False
        self._requests: dict[str, deque[PendingRequest[Item, Result]]] = {}  # by caller; empty ones are removed
        self._turns: deque[str] = deque()  # callers with waiting images, the next one first
        self._held: dict[str, int] = {}  # images reserved or waiting, by caller
        self._waiting = 0
        self._reserved = 0
        self._images_per_s = 0.0

    @property
    def waiting(self) -> int:
        """Images that wait for a batch."""
        return self._waiting

    @property
    def size(self) -> int:
        """Images that wait or are being decoded."""
        return self._waiting + self._reserved

    def reserve(self, count: int, caller: str = "") -> Reservation:
        """Places for `count` images. Raises QueueFull, or NotReady after `close`."""
        with self.changed:
            self.check(count, caller)
            self._reserved += count
            self._held[caller] = self._held.get(caller, 0) + count
        return Reservation(self._release, count, caller)

    def check(self, count: int, caller: str = "") -> None:
        """Raises what `reserve` raises, without a reservation."""
        if self.closed:
            raise NotReady("The service is shutting down.", retry_after_s=1)
        held = self._held.get(caller, 0) + count
        if self.caller_limit < min(held, self.limit):
            detail = f"This caller has {held - count} images waiting; the limit for one caller is {self.caller_limit}."
            raise QueueFull(detail, self.estimated_wait_s())
        limit = self.limit if held <= self.small_limit else self.limit - self.small_limit
        if self.size + count > limit:
            raise QueueFull(f"{self.size} images are waiting; the limit is {limit}.", self.estimated_wait_s())

    @property
    def has_short_caller(self) -> bool:
        """Whether a caller of a few images waits beside a few others, of whom at least one has many."""
        if not 1 < len(self._turns) <= FEW_CALLERS:
            return False
        held = [self._held[caller] for caller in self._turns]
        return min(held) <= FEW_IMAGES < max(held)

    def put(self, request: PendingRequest[Item, Result], reservation: Reservation) -> None:
        """Appends the request to its caller's turn; its items use up the reservation. Raises NotReady after `close`."""
        count = len(request.items)
        with self.changed:
            if self.closed:
                raise NotReady("The service is shutting down.", retry_after_s=1)
            reservation.count -= count
            self._reserved -= count
            self._waiting += count
            requests = self._requests.get(request.caller)
            if requests is None:
                requests = self._requests[request.caller] = deque()
                self._turns.append(request.caller)
            requests.append(request)

    def take(self, count: int) -> Batch[Item, Result]:
        """Removes up to `count` images, in turns; consecutive indices of each request. The caller holds `changed`."""
        now = time.monotonic()
        starts: dict[PendingRequest[Item, Result], int] = {}
        while count and self._turns:
            caller = self._turns[0]
            requests = self._requests[caller]
            request = requests.popleft()
            alone = not requests and len(self._turns) == 1
            taken = min(count, len(request.items) - request.dispatched) if alone else 1
            if request.dispatched == 0:
                request.queue_s = now - request.submitted
            starts.setdefault(request, request.dispatched)
            request.dispatched += taken
            count -= taken
            self._remove_waiting(taken, caller)
            if request.dispatched < len(request.items):
                requests.append(request)
            self._turns.popleft()
            if requests:
                self._turns.append(caller)
            else:
                del self._requests[caller]
        return [BatchSlice(request, range(start, request.dispatched)) for request, start in starts.items()]

    def remove(self, request: PendingRequest[Item, Result]) -> None:
        """Drops what still waits of a request that nobody waits for any more."""
        with self.changed:
            requests = self._requests.get(request.caller)
            if requests is None or request not in requests:
                return
            requests.remove(request)
            self._remove_waiting(len(request.items) - request.dispatched, request.caller)
            if not requests:
                del self._requests[request.caller]
                self._turns.remove(request.caller)

    def clear(self) -> list[PendingRequest[Item, Result]]:
        """Removes and gives all waiting requests."""
        with self.changed:
            removed = [request for requests in self._requests.values() for request in requests]
            for request in removed:
                self.remove(request)
        return removed

    def observe_rate(self, images_per_s: float) -> None:
        """Updates the moving average that `estimated_wait_s` divides by."""
        previous = self._images_per_s or images_per_s
        self._images_per_s = previous + RATE_SMOOTHING * (images_per_s - previous)

    def estimated_wait_s(self) -> int:
        """Whole seconds, at least 1, until what waits now has been answered at the measured rate."""
        return max(1, ceil(self.size / self._images_per_s)) if self._images_per_s else 1

    def _release(self, count: int, caller: str) -> None:
        if count:
            with self.changed:
                self._reserved -= count
                self._drop_held(count, caller)

    def _remove_waiting(self, count: int, caller: str) -> None:
        self._waiting -= count
        self._drop_held(count, caller)

    def _drop_held(self, count: int, caller: str) -> None:
        left = self._held.get(caller, 0) - count
        if left > 0:
            self._held[caller] = left
        else:
            self._held.pop(caller, None)
