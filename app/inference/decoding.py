"""Decodes the files of requests in two threads, in time slices, so that no request delays the others for long.

Files whose estimated cost is small run in the first thread, in turns of SLICE_S seconds a request (round robin). All
others run in the second thread at a lower priority, one file a turn. So a small file never waits for a large one.
A request that is cancelled or past its deadline costs at most the file that is being decoded.
"""

import asyncio
import threading
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from math import ceil

from app.engines.hardware import lower_priority
from app.errors import QueueFull, RequestError, TooLarge
from app.inference.pending import Pending
from app.model.preprocessing import DecodedImage, EncodedImage, Limits

SMALL_S = 0.02  # estimated seconds up to which a file counts as small
SLICE_S = 0.01  # seconds of a turn in the first thread
INLINE_BYTES = 32_768  # bytes, files and estimated seconds up to which a request is decoded on the event loop
INLINE_FILES = 8
INLINE_S = 0.0015

Decoded = DecodedImage | RequestError
File = bytes | Decoded  # what is decoded or refused already passes through
Opened = EncodedImage | Decoded


class DecodePool:
    """Two decoder threads. `limits` apply to one image, `max_request_pixels` to all images of a request together.

    The size of the decoded images is that of the limits, or the one that a call of `decode` names.
    """

    def __init__(self, limits: Limits, max_request_pixels: int) -> None:
        self.limits = limits
        self._max_request_pixels = max_request_pixels
        self._changed = threading.Condition()
        self._small: deque[_Job] = deque()
        self._large: deque[_Job] = deque()
        self._backlog_s = 0.0  # estimated seconds of the jobs that wait for the second thread
        self._closed = False
        self._busy_s = [0.0, 0.0]  # by thread
        self._threads = [
            threading.Thread(target=self._decode_small, name="decode-small", daemon=True),
            threading.Thread(target=self._decode_large, name="decode-large", daemon=True),
        ]

    @property
    def busy_s(self) -> tuple[float, float]:
        """Seconds in which the first and the second thread decoded, since the start."""
        return self._busy_s[0], self._busy_s[1]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Stops the threads after the files that they are decoding."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    async def decode(self, files: Sequence[File], deadline: float, size: int | None = None) -> list[Decoded]:
        """The image or the error of each file, in order. `deadline` by time.monotonic, `size` in pixels.

        Raises TooLarge for more than max_request_pixels, QueueFull when the work that waits cannot end in time.
        """
        limits = self.limits if size in (None, self.limits.size) else self.limits._replace(size=size)
        lengths = [len(file) for file in files if isinstance(file, bytes)]
        if len(lengths) <= INLINE_FILES and sum(lengths) <= INLINE_BYTES:
            opened = [_open(file, limits) for file in files]
            if all(map(_is_cheap, opened)) and sum(map(_cost_s, opened)) <= INLINE_S:
                return [_decode(image) for image in opened]
        job = _Job(files, limits, deadline, asyncio.get_running_loop())
        self._append(job)
        try:
            return await job.future
        finally:
            job.cancelled = True

    def _append(self, job: "_Job") -> None:
        with self._changed:
            job.queued_s = 0.0 if job.next_cost_s <= SMALL_S else job.large_s
            self._backlog_s += job.queued_s
            (self._large if job.queued_s else self._small).append(job)
            self._changed.notify_all()

    def _next(self, lane: deque["_Job"]) -> "_Job | None":
        with self._changed:
            while not lane and not self._closed:
                self._changed.wait()
            if self._closed:
                return None
            job = lane.popleft()
            self._backlog_s -= job.queued_s
            return job

    def _decode_small(self) -> None:
        while job := self._next(self._small):
            start = time.monotonic()
            while self._advance(job, small=True) and time.monotonic() < start + SLICE_S:
                pass
            self._busy_s[0] += time.monotonic() - start
            self._finish_turn(job)

    def _decode_large(self) -> None:
        lower_priority()
        while job := self._next(self._large):
            start = time.monotonic()
            self._advance(job, small=False)
            self._busy_s[1] += time.monotonic() - start
            self._finish_turn(job)

    def _advance(self, job: "_Job", small: bool) -> bool:
        """Opens or decodes one file; whether this thread may go on with the job."""
        if job.abandoned or job.finished:
            return False
        if len(job.opened) < len(job.files):
            job.opened.append(_open(job.files[len(job.opened)], job.limits))
            if len(job.opened) == len(job.files):
                job.error = self._refusal(job)
        elif (job.next_cost_s <= SMALL_S) is small:
            job.results.append(_decode(job.opened[len(job.results)]))
        else:
            return False
        return True

    def _refusal(self, job: "_Job") -> RequestError | None:
        """The error of a request whose images are too many pixels, or would not be decoded before its deadline."""
        pixels = sum(image.decoded_pixels for image in job.opened if isinstance(image, EncodedImage))
        if pixels > self._max_request_pixels:
            return TooLarge(
                f"The images have {pixels} pixels; at most {self._max_request_pixels} are accepted at once."
            )
        backlog_s = self._backlog_s
        if job.large_s and time.monotonic() + backlog_s > job.deadline:
            return QueueFull("Too many large images are waiting to be decoded.", max(1, ceil(backlog_s)))
        return None

    def _finish_turn(self, job: "_Job") -> None:
        """Delivers a finished job, drops an abandoned one, and puts any other at the end of a lane."""
        if job.finished:
            with suppress(RuntimeError):  # the event loop is closed
                job.loop.call_soon_threadsafe(job.resolve)
        elif not job.abandoned:
            self._append(job)


class _Job(Pending[list[Decoded]]):
    """The files of one request. Each is first opened (its header is scanned), then decoded."""

    def __init__(self, files: Sequence[File], limits: Limits, deadline: float, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(loop)
        self.files = files
        self.limits = limits
        self.deadline = deadline
        self.opened: list[Opened] = []
        self.results: list[Decoded] = []
        self.cancelled = False
        self.queued_s = 0.0  # estimated seconds counted in the backlog

    @property
    def abandoned(self) -> bool:
        return self.cancelled or time.monotonic() > self.deadline

    @property
    def finished(self) -> bool:
        return self.error is not None or len(self.results) == len(self.files)

    @property
    def next_cost_s(self) -> float:
        """Estimated seconds of the next step."""
        return 0.0 if len(self.opened) < len(self.files) else _cost_s(self.opened[len(self.results)])

    @property
    def large_s(self) -> float:
        """Estimated seconds of the files that wait for the second thread."""
        costs = (_cost_s(image) for image in self.opened[len(self.results) :])
        return sum(cost for cost in costs if cost > SMALL_S)

    def value(self) -> list[Decoded]:
        return self.results


def _cost_s(image: Opened) -> float:
    return image.cost_s if isinstance(image, EncodedImage) else 0.0


def _is_cheap(image: Opened) -> bool:
    return not isinstance(image, EncodedImage) or image.is_cheap


def _open(file: File, limits: Limits) -> Opened:
    if not isinstance(file, bytes):
        return file
    try:
        return EncodedImage(file, limits)
    except RequestError as error:
        return error


def _decode(image: Opened) -> Decoded:
    if not isinstance(image, EncodedImage):
        return image
    try:
        return image.decode()
    except RequestError as error:
        return error
