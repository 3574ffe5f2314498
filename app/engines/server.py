"""The other side of `RemoteEngine`: runs what waits on all channels as one batch."""

import logging
import selectors
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from app.engines.base import Output
from app.engines.channel import Channel, Operation, Status
from app.errors import DeviceLostError

Run = Callable[[NDArray[np.uint8], bool], Output]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class EngineModel:
    """What the calls of some channels run on. `verify` raises if the model no longer reproduces its outputs."""

    run: Run
    verify: Callable[[], None]


class Call(NamedTuple):
    channel: Channel
    model: EngineModel
    operation: Operation
    images: int


class EngineServer:
    """`streams` threads that call `run(images, exclusive)` with the images of all calls that wait, up to `max_batch`.

    A batch runs on one model. A call is not split over batches. There is no batching window, and a second thread starts
    beside a busy one only for a full batch, as in `app.inference.batcher`. When `run` raises, the calls of the batch
    run one by one; a call that fails alone gets FAILED. When `verify` raises, or `run` raises DeviceLostError, the
    server fails: `failure` is the cause, and no call is answered any more.

    `on_batch(images, seconds)` is called after each batch, `on_close(model)` after a front end has closed a channel. An
    idle thread keeps no reference to a model.
    """

    def __init__(
        self,
        max_batch: int,
        streams: int = 1,
        on_batch: Callable[[int, float], None] = lambda images, seconds: None,
        on_close: Callable[[EngineModel], None] = lambda model: None,
    ) -> None:
        self.failure: Exception | None = None
        self._on_batch, self._on_close = on_batch, on_close
        self._max_batch = max_batch
        self._waiting: deque[Call] = deque()
        self._waiting_images = 0
        self._running: dict[int, float] = {}  # time.monotonic of the start, by thread
        self._leading = threading.Lock()  # held by the thread that waits for messages; it runs the next batch itself
        self._selector = selectors.DefaultSelector()
        self._added: deque[tuple[Channel, EngineModel]] = deque()
        self._closed = False
        self._wake_receiver, self._wake_sender = socket.socketpair()
        for end in (self._wake_receiver, self._wake_sender):
            end.setblocking(False)
        self._selector.register(self._wake_receiver, selectors.EVENT_READ, None)
        self._threads = [
            threading.Thread(target=self._work, args=(thread,), name=f"inference-{thread}", daemon=True)
            for thread in range(streams)
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def add(self, channels: Sequence[Channel], model: EngineModel) -> None:
        """Answers these channels, too, until their front end closes them."""
        self._added.extend((channel, model) for channel in channels)
        self._wake()

    @property
    def alive(self) -> bool:
        return all(thread.is_alive() for thread in self._threads)

    @property
    def oldest_start(self) -> float | None:
        """Start of the longest running batch by time.monotonic; None while no batch runs."""
        return min(list(self._running.values()), default=None)

    def abort(self) -> None:
        """Starts no further batch."""
        self._closed = True
        self._wake()

    def close(self) -> None:
        """Waits for running batches, then closes all channels."""
        self.abort()
        for each in self._threads:
            each.join()
        self._register_added()
        for key in list(self._selector.get_map().values()):
            if key.data is not None:
                key.data[0].connection.close()
        self._selector.close()
        self._wake_receiver.close()
        self._wake_sender.close()

    def _work(self, thread: int) -> None:
        while self._run_next(thread):
            pass

    def _run_next(self, thread: int) -> bool:
        """Runs one batch; False once no more will run."""
        if (batch := self._next(thread)) is None:
            return False
        calls, exclusive = batch
        start = self._running[thread]
        try:
            statuses = self._execute(calls, exclusive)
        except Exception as error:
            logger.critical("the device is lost: %s", error)
            self.failure = error
            self.abort()
            return False
        seconds = time.monotonic() - start
        del self._running[thread]
        if self._waiting:
            self._wake()  # the leader may start now
        for call, status in zip(calls, statuses, strict=True):
            with suppress(OSError):  # the front end has exited
                call.channel.reply(status)
        if images := sum(call.images for call in calls):
            self._on_batch(images, seconds)
        return True

    def _next(self, thread: int) -> tuple[list[Call], bool] | None:
        """The calls of the next batch, and whether no other batch runs; None once closed."""
        with self._leading:
            while not self._closed:
                self._receive_messages(self._selector.select(0 if self._may_start() else None))
                if self._may_start():
                    return self._take(thread)
        return None

    def _may_start(self) -> bool:
        """Beside a busy thread only a full batch: small ones cost more each."""
        return bool(self._waiting) and (not self._running or self._waiting_images >= self._max_batch)

    def _take(self, thread: int) -> tuple[list[Call], bool]:
        calls, exclusive = [self._waiting.popleft()], not self._running
        images = calls[0].images
        while (
            self._waiting
            and calls[0].operation is self._waiting[0].operation is Operation.RUN
            and calls[0].model is self._waiting[0].model
            and images + self._waiting[0].images <= self._max_batch
        ):
            calls.append(self._waiting.popleft())
            images += calls[-1].images
        self._waiting_images -= images
        self._running[thread] = time.monotonic()
        return calls, exclusive

    def _receive_messages(self, ready: Sequence[tuple[selectors.SelectorKey, int]]) -> None:
        for key, _ in ready:
            self._receive(key.data)

    def _receive(self, added: tuple[Channel, EngineModel] | None) -> None:
        if added is None:
            self._register_added()
            return
        channel, model = added
        try:
            call = Call(channel, model, *channel.receive_call())
        except OSError:
            self._selector.unregister(channel.connection)
            channel.connection.close()
            self._on_close(model)
            return
        self._waiting.append(call)
        self._waiting_images += call.images

    def _register_added(self) -> None:
        with suppress(BlockingIOError):
            self._wake_receiver.recv(4096)
        while self._added:
            channel, model = self._added.popleft()
            self._selector.register(channel.connection, selectors.EVENT_READ, (channel, model))

    def _wake(self) -> None:
        with suppress(BlockingIOError):  # full: the leader wakes anyway
            self._wake_sender.send(b"\0")

    def _execute(self, calls: Sequence[Call], exclusive: bool) -> list[Status]:
        """A status per call. Raises what `verify` raises, and DeviceLostError."""
        if calls[0].operation is Operation.VERIFY:
            calls[0].model.verify()
            return [Status.DONE]
        try:
            self._run_together(calls, exclusive)
        except DeviceLostError:
            raise
        except Exception:
            if len(calls) == 1:
                logger.exception("inference failed for a call of %d images", calls[0].images)
                return [Status.FAILED]
            return [status for call in calls for status in self._execute([call], exclusive)]
        return [Status.DONE] * len(calls)

    def _run_together(self, calls: Sequence[Call], exclusive: bool) -> None:
        parts = [call.channel.pixels[: call.images] for call in calls]
        output = calls[0].model.run(parts[0] if len(parts) == 1 else np.concatenate(parts), exclusive)
        start = 0
        for channel, _, _, images in calls:
            end = start + images
            channel.ood[:images] = np.nan if output.ood is None else output.ood[start:end]
            channel.probabilities[:images] = output.probabilities[start:end]
            channel.stages[:images] = output.stages[start:end]
            start = end
