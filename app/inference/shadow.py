"""A candidate model that runs on a sample of the traffic beside the model that serves (a shadow deployment).

Responses do not depend on it: it gets the images and results of requests after they were answered, in a thread of its
own, and drops what it has no time for. It runs while the service is idle; otherwise for at most BUSY_SHARE of the time
of one low-priority thread.
"""

import logging
import random
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from app.errors import RequestError
from app.inference.classifier import Classifier, Probabilities, Scores
from app.inference.decoding import Decoded, File
from app.model.preprocessing import DecodedImage, EncodedImage, Limits

BUSY_SHARE = 0.04
IDLE_S = 0.05  # without a request, after which the service counts as idle
POLL_S = 0.02
MAX_PENDING = 64  # images
MAX_BATCH = 8  # images: a request that arrives during a pass is delayed little

logger = logging.getLogger(__name__)

OnPass = Callable[[Sequence[tuple[str, bool]], float], None]


class Sample(NamedTuple):
    """An image, or its file where the shadow has another input size, and what the model that serves returned for it."""

    source: DecodedImage | bytes
    classes: list[str]
    probabilities: Probabilities

    @property
    def label(self) -> str:
        return self.classes[int(self.probabilities.argmax())]


class Shadow:
    """`classifier` is the candidate, None for none. `offer` belongs to the event loop, the rest to any thread.

    `is_busy` is true while requests wait or run. `on_pass` gets the label of each image by the model that serves and
    whether the shadow agrees, and the seconds of the pass.
    """

    def __init__(
        self, limits: Limits, sample: float, is_busy: Callable[[], bool], on_pass: OnPass = lambda labels, seconds: None
    ) -> None:
        self._limits = limits
        self._sample = sample
        self._is_busy = is_busy
        self._on_pass = on_pass
        self._classifier: Classifier | None = None
        self._pending: deque[Sample] = deque()
        self._wake = threading.Event()
        self._closing = threading.Event()
        self._last_request = self._next_pass = float("-inf")  # by time.monotonic
        self._reset()
        self._thread = threading.Thread(target=self._work, name="shadow", daemon=True)

    @property
    def classifier(self) -> Classifier | None:
        return self._classifier

    def replace(self, classifier: Classifier | None) -> Classifier | None:
        """Switches to another candidate, or to none, with new counts; returns the former."""
        former, self._classifier = self._classifier, classifier
        self._pending.clear()
        self._reset()
        return former

    def start(self) -> None:
        self._thread.start()

    def close(self, timeout_s: float) -> None:
        """Stops after the pass that runs."""
        self._closing.set()
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def offer(
        self, classifier: Classifier, files: Sequence[File], decoded: Sequence[Decoded], scores: Sequence[Scores]
    ) -> None:
        """The images of an answered request, which `classifier` ran; its scores are those of the decoded images."""
        self._last_request = time.monotonic()
        room = MAX_PENDING - len(self._pending)
        if self._classifier is None or room <= 0 or random.random() >= self._sample:  # noqa: S311
            return
        is_same_size = self._classifier.input_size == classifier.input_size
        pairs = [pair for pair in zip(files, decoded, strict=True) if isinstance(pair[1], DecodedImage)][:room]
        for (file, image), score in zip(pairs, scores, strict=False):
            source = image if is_same_size else file
            if isinstance(source, (bytes, DecodedImage)):
                self._pending.append(Sample(source, classifier.classes, score.probabilities))
        self._wake.set()

    def report(self) -> dict[str, Any] | None:
        """What `GET /model` shows: agreement with the model that serves, by its labels, and time per image."""
        if (classifier := self._classifier) is None:
            return None
        counts = {label: tuple(count) for label, count in sorted(self._counts.items())}
        images, agreeing = (sum(count[i] for count in counts.values()) for i in (0, 1))
        return {
            "name": classifier.weights.card.name,
            "version": classifier.weights.version,
            "sample": self._sample,
            "images": images,
            "agreement": _share(agreeing, images),
            "classes": {
                label: {"images": count, "agreement": _share(same, count)} for label, (count, same) in counts.items()
            },
            "ms_per_image": round(self._seconds / images * 1e3, 3) if images else None,
        }

    def _reset(self) -> None:
        self._counts: defaultdict[str, list[int]] = defaultdict(lambda: [0, 0])  # images and agreeing ones, by label
        self._seconds = 0.0

    def _work(self) -> None:
        while not self._closing.is_set():
            self._wake.wait()
            self._wake.clear()
            while self._pending and not self._closing.is_set():
                if self._has_time():
                    self._run_next()
                else:
                    self._closing.wait(POLL_S)

    def _has_time(self) -> bool:
        now = time.monotonic()
        return now >= self._next_pass or (now - self._last_request > IDLE_S and not self._is_busy())

    def _run_next(self) -> None:
        start, classifier = time.monotonic(), self._classifier
        if classifier is not None:
            try:
                self._compare(classifier, start)
            except Exception:
                logger.exception("the shadow failed and is off")
                self.replace(None)
        end = time.monotonic()
        self._next_pass = end + (end - start) * (1 / BUSY_SHARE - 1)

    def _compare(self, classifier: Classifier, start: float) -> None:
        """Runs some of the samples and counts the agreement."""
        counts = self._counts
        samples = [self._pending.popleft() for _ in range(min(MAX_BATCH, len(self._pending)))]
        decoded = [(sample, self._decode(sample.source, classifier.input_size)) for sample in samples]
        images = [(sample, image) for sample, image in decoded if image is not None]
        if not images:
            return
        scores = classifier([image for _, image in images], exclusive=False)
        seconds = time.monotonic() - start
        labels = [sample.label for sample, _ in images]
        agrees = [
            classifier.classes[int(score.probabilities.argmax())] == label
            for score, label in zip(scores, labels, strict=True)
        ]
        for label, same in zip(labels, agrees, strict=True):
            counts[label][0] += 1
            counts[label][1] += same
        self._seconds += seconds
        self._on_pass(list(zip(labels, agrees, strict=True)), seconds)

    def _decode(self, source: DecodedImage | bytes, size: int) -> DecodedImage | None:
        """The image in the shadow's input size; None where there is none, as after a change of the shadow."""
        if isinstance(source, DecodedImage):
            return source if source.pixels.shape[0] == size else None
        try:
            return EncodedImage(source, self._limits._replace(size=size)).decode()
        except RequestError:
            return None


def _share(part: int, whole: int) -> float | None:
    return round(part / whole, 4) if whole else None
