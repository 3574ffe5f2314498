"""The path of a request's images: reserve places, decode, queue, run, all before one deadline."""

import asyncio
from collections.abc import Sequence
from time import monotonic, perf_counter
from typing import NamedTuple

from app.errors import DeadlineExceeded, RequestError
from app.inference.batcher import Batcher
from app.inference.classifier import Classifier, Probabilities, Scores
from app.inference.decoding import Decoded, DecodePool, File
from app.inference.queue import Reservation
from app.inference.shadow import Shadow
from app.model.preprocessing import DecodedImage, Limits

SHADOW_CLOSE_S = 1.0


class Deadline(NamedTuple):
    """`at` by time.monotonic, `timeout_s` seconds after the request was accepted."""

    timeout_s: float
    at: float

    @classmethod
    def after(cls, timeout_s: float) -> "Deadline":
        return cls(timeout_s, monotonic() + timeout_s)

    @property
    def left_s(self) -> float:
        return self.at - monotonic()

    def exceeded(self) -> DeadlineExceeded:
        return DeadlineExceeded(f"No answer within {self.timeout_s:g} s.")


class Prediction(NamedTuple):
    """Probabilities float32 [classes] of an image, the cascade's stage after which it left, and its size.

    `ood` is the out-of-distribution score, or None; `brightness` is from 0 to 255. `resized_from` is (width, height) if
    that is not the model's input size.
    """

    probabilities: Probabilities
    stage: int
    ood: float | None
    brightness: float
    resized_from: tuple[int, int] | None


class Classification(NamedTuple):
    """A prediction or an error per file, in order; `start` by time.perf_counter, then the seconds of each step."""

    outcomes: list[Prediction | RequestError]
    start: float
    decode_s: float
    queue_s: float = 0.0
    inference_s: float = 0.0


class RejectedFile(Exception):
    """The file at `index` cannot be decoded, and the request accepts no errors per file."""

    def __init__(self, index: int, error: RequestError) -> None:
        super().__init__(str(error))
        self.index = index
        self.error = error


class Pipeline:
    """What `POST /predict`, the Open Inference Protocol and `python -m app classify` share.

    `classifier` is the model that serves. A request keeps the one that it started with, for decoding to its input size
    and for every batch. `shadow` is set before the start, if at all.
    """

    def __init__(self, classifier: Classifier, decoder: DecodePool, batcher: Batcher[DecodedImage, Scores]) -> None:
        self.classifier = classifier
        self.shadow: Shadow | None = None
        self.batcher = batcher
        self._decoder = decoder
        self._queue = batcher.queue

    @property
    def limits(self) -> Limits:
        """Of one image; the size is that of the first classifier."""
        return self._decoder.limits

    @property
    def decoder_busy_s(self) -> tuple[float, float]:
        """Seconds in which each of the decoder threads worked, since the start."""
        return self._decoder.busy_s

    def replace(self, classifier: Classifier) -> Classifier:
        """Later requests run on this classifier; returns the former. Belongs to the event loop."""
        former, self.classifier = self.classifier, classifier
        self.batcher.resize(classifier.batch_sizes)
        return former

    def start(self) -> None:
        self._decoder.start()
        self.batcher.start()
        if self.shadow is not None:
            self.shadow.start()

    def close(self, timeout_s: float) -> None:
        """Answers what is queued, for at most timeout_s seconds, and stops all threads."""
        self._decoder.close()
        if self.shadow is not None:
            self.shadow.close(SHADOW_CLOSE_S)
        self.batcher.close(timeout_s)

    def check_capacity(self, count: int, caller: str = "") -> None:
        """Raises QueueFull or NotReady if `count` images would be refused now."""
        self._queue.check(count, caller)

    async def classify(
        self,
        files: Sequence[File],
        deadline: Deadline,
        caller: str = "",
        *,
        classifier: Classifier | None = None,
        errors_per_file: bool = True,
    ) -> Classification:
        """Files to predictions; decoded images and known errors pass through. A cancelled call leaves no work behind.

        Without a `classifier`, the one that serves. Raises QueueFull, NotReady, TooLarge (pixels of the request),
        DeadlineExceeded; RejectedFile for the first bad file unless `errors_per_file`; what the engine raised for one
        of the images.
        """
        start = perf_counter()
        classifier = classifier or self.classifier
        with self._queue.reserve(len(files), caller) as reservation:
            classifier.users += 1
            try:
                async with asyncio.timeout(deadline.left_s):
                    decoded = await self._decoder.decode(files, deadline.at, classifier.input_size)
                    if not errors_per_file:
                        _require_all(decoded)
                    return await self._run(classifier, files, decoded, reservation, start)
            except TimeoutError as error:
                raise deadline.exceeded() from error
            finally:
                classifier.users -= 1

    async def _run(
        self,
        classifier: Classifier,
        files: Sequence[File],
        decoded: Sequence[Decoded],
        reservation: Reservation,
        start: float,
    ) -> Classification:
        decode_s = perf_counter() - start
        images = [image for image in decoded if isinstance(image, DecodedImage)]
        if not images:
            return Classification([image for image in decoded if isinstance(image, RequestError)], start, decode_s)
        result = await self.batcher.submit(classifier, images, reservation)
        if self.shadow is not None:
            self.shadow.offer(classifier, files, decoded, result.results)
        rows = iter(result.results)
        outcomes: list[Prediction | RequestError] = [
            image if isinstance(image, RequestError) else Prediction(*next(rows), image.resized_from)
            for image in decoded
        ]
        return Classification(outcomes, start, decode_s, result.queue_s, result.inference_s)


def _require_all(decoded: Sequence[Decoded]) -> None:
    for index, image in enumerate(decoded):
        if isinstance(image, RequestError):
            raise RejectedFile(index, image)
