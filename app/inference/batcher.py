"""Continuous batching: worker threads that run what waits. Knows neither HTTP nor images nor torch.

There is no batching window. An idle worker runs what waits at the end of the event loop's turn, so that requests which
arrive together share a batch; what arrives during a forward pass forms the next batch. A further worker runs beside a
busy one only when a full batch waits. A request's items may be spread over several batches and share them with other
requests. While one model replaces another, a batch may have requests of both; each model runs its own.
"""

import asyncio
import logging
import threading
import time
from bisect import bisect_right
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import islice
from typing import Generic, NamedTuple, TypeVar

from app.errors import DeviceLostError, NotReady
from app.inference.queue import Batch, BatchResult, BatchSlice, Model, PendingRequest, RequestQueue, Reservation

Item = TypeVar("Item")
Result = TypeVar("Result")

logger = logging.getLogger(__name__)


def batch_sizes(largest: int) -> list[int]:
    """1, 2, 3, 4, 6, 8, 12 and so on up to `largest`: few enough to prepare, dense enough to leave little waiting."""
    sizes = {2**k * part // 2 for k in range(largest.bit_length()) for part in (2, 3)}
    return sorted({size for size in sizes if size <= largest} | {largest})


class RunningBatch(NamedTuple, Generic[Item, Result]):
    """A batch on a worker. `exclusive` if no other worker was busy at its start."""

    batch: Batch[Item, Result]
    exclusive: bool
    start: float


SliceResult = tuple[BatchSlice[Item, Result], Sequence[Result] | Exception]


class Batcher(Generic[Item, Result]):
    """`streams` worker threads that call a model with as many waiting items as the largest of `sizes` that they fill.

    A call is exclusive if no other worker runs at that moment. When it raises, the batch is bisected until the failing
    items are isolated. When all items of a batch fail, `Model.verify` runs. If that raises, too, or a call raises
    DeviceLostError, the batcher fails: all requests get NotReady and `failure` is the cause. `on_batch(size, seconds)`
    is called after each batch, never concurrently.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        queue: RequestQueue[Item, Result],
        streams: int = 1,
        on_batch: Callable[[int, float], None] = lambda size, seconds: None,
    ) -> None:
        self.queue = queue
        self.failure: Exception | None = None
        self._sizes = sorted(sizes)
        self._on_batch = on_batch
        self._running: dict[int, RunningBatch[Item, Result]] = {}  # by worker
        self._wakes: set[asyncio.AbstractEventLoop] = set()  # event loops that will wake a worker in this turn
        self._threads = [
            threading.Thread(target=self._work, args=(worker,), name=f"inference-{worker}", daemon=True)
            for worker in range(streams)
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    @property
    def alive(self) -> bool:
        return all(thread.is_alive() for thread in self._threads)

    @property
    def oldest_start(self) -> float | None:
        """Start of the longest running batch by time.monotonic; None while no batch runs."""
        with self.queue.changed:
            return min((running.start for running in self._running.values()), default=None)

    async def submit(
        self, model: Model[Item, Result], items: Sequence[Item], reservation: Reservation
    ) -> BatchResult[Result]:
        """Queues the items in reserved places and waits for all results. A cancelled request leaves the queue.

        Raises NotReady after `close`, or what the model raised for one of the items.
        """
        loop = asyncio.get_running_loop()
        request = PendingRequest(model, items, reservation.caller, loop)
        self.queue.put(request, reservation)
        if loop not in self._wakes:
            self._wakes.add(loop)
            loop.call_soon(self._end_turn, loop)
        try:
            return await request.future
        finally:
            if not request.done:
                self.queue.remove(request)

    def close(self, timeout_s: float = 0.0) -> None:
        """Stops the threads once the queue is empty, or after timeout_s seconds; what still waits gets NotReady."""
        with self.queue.changed:
            self.queue.closed = True
            self.queue.changed.notify_all()
        deadline = time.monotonic() + timeout_s
        for thread in self._threads:
            if thread.is_alive():
                thread.join(max(0.0, deadline - time.monotonic()))
        self._reject(self.queue.clear())

    def abort(self) -> None:
        """Answers all that waits or runs with NotReady and accepts no more."""
        with self.queue.changed:
            self.queue.closed = True
            running = [part.request for each in self._running.values() for part in each.batch]
            self.queue.changed.notify_all()
        self._reject(running + self.queue.clear())

    def _reject(self, requests: Sequence[PendingRequest[Item, Result]]) -> None:
        for request in requests:
            request.error = NotReady("The service stopped before this request was answered.", retry_after_s=1)
        _deliver(requests)

    def _work(self, worker: int) -> None:
        while self._run_next(worker):
            pass  # an idle worker keeps no reference to a batch or its model

    def _run_next(self, worker: int) -> bool:
        """Runs one batch; False once no more will run."""
        if (running := self._next_batch(worker)) is None:
            return False
        try:
            results = self._run_by_model(running.batch, running.exclusive)
        except Exception as error:
            logger.critical("the device is lost: %s", error)
            self.failure = error
            self.abort()
            return False
        self._complete(worker, results)
        return True

    def _next_batch(self, worker: int) -> RunningBatch[Item, Result] | None:
        """As many waiting items as the largest size that they fill; None once closed and drained."""
        queue = self.queue
        with queue.changed:
            while not self._has_work() and not queue.closed:
                queue.changed.wait()
            if not queue.waiting:
                return None
            running = RunningBatch(queue.take(self._largest_size(queue.waiting)), not self._running, time.monotonic())
            self._running[worker] = running
            self._wake()
        return running

    def _has_work(self) -> bool:
        """Whether an idle worker may start. Beside a busy one only a full batch: small ones cost more each."""
        return self.queue.waiting >= (self._sizes[-1] if self._running else 1)

    def _end_turn(self, loop: asyncio.AbstractEventLoop) -> None:
        self._wakes.discard(loop)
        with self.queue.changed:
            self._wake()

    def _wake(self) -> None:
        if self._has_work():  # waking a worker without work delays the event loop
            self.queue.changed.notify()

    def _largest_size(self, count: int) -> int:
        """The largest of the sizes that `count` items fill."""
        return self._sizes[max(0, bisect_right(self._sizes, count) - 1)]

    def _run_by_model(self, batch: Batch[Item, Result], exclusive: bool) -> list[SliceResult[Item, Result]]:
        """The results of all slices, one model after the other; raises what ends the batcher."""
        results: list[SliceResult[Item, Result]] = []
        for model in {part.request.model: None for part in batch}:
            own = [part for part in batch if part.request.model is model]
            own_results = self._run_with_bisection(model, own, exclusive)
            if all(isinstance(result, Exception) for _, result in own_results):
                model.verify()
            results += own_results
        return results

    def _run_with_bisection(
        self, model: Model[Item, Result], batch: Batch[Item, Result], exclusive: bool
    ) -> list[SliceResult[Item, Result]]:
        """Each slice's results, or the error of an item that fails on its own. Raises DeviceLostError."""
        items = [item for part in batch for item in part.items]
        try:
            row = iter(self._run(model, items, exclusive))
        except DeviceLostError:
            raise
        except Exception as error:
            if len(items) == 1:
                logger.exception("inference failed for one item")
                return [(batch[0], error)]
            return [result for half in _bisect(batch) for result in self._run_with_bisection(model, half, exclusive)]
        return [(part, list(islice(row, len(part.indices)))) for part in batch]

    def _run(self, model: Model[Item, Result], items: Sequence[Item], exclusive: bool) -> list[Result]:
        """One result per item, in calls of the sizes: the whole batch in one, a part of it perhaps in several."""
        results: list[Result] = []
        while len(results) < len(items):
            size = self._largest_size(len(items) - len(results))
            part = items[len(results) : len(results) + size]
            part_results = model(part, exclusive)
            if len(part_results) != len(part):
                raise RuntimeError(f"{len(part_results)} results for {len(part)} items")
            results += part_results
        return results

    def _complete(self, worker: int, results: list[SliceResult[Item, Result]]) -> None:
        """Delivers finished requests and updates the measured rate."""
        with self.queue.changed:
            concurrent = len(self._running)  # batches that shared the cores with this one
            running = self._running.pop(worker)
            seconds = time.monotonic() - running.start
            count = sum(len(part.indices) for part in running.batch)
            self.queue.observe_rate(concurrent * count / max(seconds, 1e-6))
            for part, result in results:
                if isinstance(result, Exception):
                    part.request.error = result
                else:
                    part.request.results.update(zip(part.indices, result, strict=True))
            for request in (part.request for part in running.batch):
                request.inference_s += seconds
                if request.error is not None:
                    self.queue.remove(request)
            self._on_batch(count, seconds)
            done = [part.request for part in running.batch if part.request.done]
        _deliver(done)


def _bisect(batch: Batch[Item, Result]) -> tuple[Batch[Item, Result], Batch[Item, Result]]:
    """Two halves: between requests if the batch has several, else within its only request."""
    if len(batch) > 1:
        middle = len(batch) // 2
        return batch[:middle], batch[middle:]
    ((request, indices),) = batch
    middle = len(indices) // 2
    return [BatchSlice(request, indices[:middle])], [BatchSlice(request, indices[middle:])]


def _deliver(requests: Sequence[PendingRequest[Item, Result]]) -> None:
    """Resolves the requests on their event loops, in one call per loop."""
    for loop in {request.loop for request in requests}:
        own = [request for request in requests if request.loop is loop]
        with suppress(RuntimeError):  # the event loop is closed
            loop.call_soon_threadsafe(_resolve_all, own)


def _resolve_all(requests: Sequence[PendingRequest[Item, Result]]) -> None:
    for request in requests:
        request.resolve()
