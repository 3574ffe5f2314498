"""Continuous batching: worker threads that run what waits. Independent of HTTP, images and torch.

There is no batching window. An idle worker runs what waits at the end of the event loop's turn, so that requests which
arrive together share a batch; what arrives during a forward pass forms the next batch. A further worker runs beside a
busy one only when a full batch waits, or where another process merges the batches of several. A request's items may be
spread over several batches and share them with other requests. While one model replaces another, a batch may have
requests of both; each model runs its own.
"""

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Generic, NamedTuple, TypeVar

from app.errors import NotReady
from app.inference.bisection import SliceResult, largest_size, run_by_model
from app.inference.model import Model
from app.inference.queue import Batch, BatchResult, PendingRequest, RequestQueue, Reservation

Item = TypeVar("Item")
Result = TypeVar("Result")

SHORT_BATCH = 16  # images of a batch that has a caller of a few: its response waits for the whole batch

logger = logging.getLogger(__name__)


class RunningBatch(NamedTuple, Generic[Item, Result]):
    """A batch on a worker. `exclusive` if no other worker was busy at its start."""

    batch: Batch[Item, Result]
    exclusive: bool
    start: float

    @property
    def size(self) -> int:
        return sum(len(part.indices) for part in self.batch)


class Batcher(Generic[Item, Result]):
    """`streams` worker threads that call a model with as many waiting items as the largest of `sizes` that they fill.

    A call is exclusive if no other worker runs at that moment. When it raises, the batch is bisected until the failing
    items are isolated. When all items of a batch fail, `Model.verify` runs. If that raises, too, or a call raises
    DeviceLostError, the batcher fails: all requests get NotReady and `failure` is the cause. `on_batch(size, seconds)`
    is called after each batch, never concurrently.

    `merges_calls` is for a model that runs the calls that wait, also those of other batchers, as one batch: the batch
    beside a running one then needs only its size to start.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        queue: RequestQueue[Item, Result],
        streams: int = 1,
        on_batch: Callable[[int, float], None] = lambda size, seconds: None,
        merges_calls: bool = False,
    ) -> None:
        self.queue = queue
        self._merges_calls = merges_calls
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
    def max_batch(self) -> int:
        return self._sizes[-1]

    def resize(self, sizes: Sequence[int]) -> None:
        """For later batches, which another model serves."""
        self._sizes = sorted(sizes)

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
            results = run_by_model(running.batch, self._sizes, running.exclusive)
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
            limit = SHORT_BATCH if queue.has_short_caller else queue.waiting
            size = largest_size(self._sizes, min(limit, queue.waiting))
            running = RunningBatch(queue.take(size), not self._running, time.monotonic())
            self._running[worker] = running
            self._wake()
        return running

    def _has_work(self) -> bool:
        """Whether an idle worker may start. Beside a busy one only a full batch, as small ones cost more each."""
        return self.queue.waiting >= self._smallest_batch()

    def _smallest_batch(self) -> int:
        if not self._running:
            return 1
        return min(each.size for each in self._running.values()) if self._merges_calls else self._sizes[-1]

    def _end_turn(self, loop: asyncio.AbstractEventLoop) -> None:
        self._wakes.discard(loop)
        with self.queue.changed:
            self._wake()

    def _wake(self) -> None:
        if self._has_work():  # waking a worker without work delays the event loop
            self.queue.changed.notify()

    def _complete(self, worker: int, results: list[SliceResult[Item, Result]]) -> None:
        """Delivers finished requests and updates the measured rate."""
        with self.queue.changed:
            concurrent = len(self._running)  # batches that shared the cores with this one
            running = self._running.pop(worker)
            seconds = time.monotonic() - running.start
            count = running.size
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


def _deliver(requests: Sequence[PendingRequest[Item, Result]]) -> None:
    """Resolves the requests on their event loops, in one call per loop."""
    for loop in {request.loop for request in requests}:
        own = [request for request in requests if request.loop is loop]
        with suppress(RuntimeError):  # the event loop is closed
            loop.call_soon_threadsafe(_resolve_all, own)


def _resolve_all(requests: Sequence[PendingRequest[Item, Result]]) -> None:
    for request in requests:
        request.resolve()
