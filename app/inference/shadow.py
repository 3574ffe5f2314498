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

from app.engines.hardware import lower_priority
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


class Candidate:
    """A model, the samples that wait for it, and its counts."""

    def __init__(self, classifier: Classifier) -> None:
        self.classifier = classifier
        self.pending: deque[Sample] = deque()
        self.counts: defaultdict[str, list[int]] = defaultdict(lambda: [0, 0])  # images and agreeing ones, by label
        self.seconds = 0.0

    def count(self, labels: Sequence[tuple[str, bool]], seconds: float) -> None:
        """The label of each image by the model that serves, and whether this one agrees."""
        for label, agrees in labels:
            self.counts[label][0] += 1
            self.counts[label][1] += agrees
        self.seconds += seconds


class Shadow:
    """`classifier` is the candidate's, None without one. `offer` belongs to the event loop, the rest to any thread.

    A pass, and a call of `offer` or `report`, is on one candidate, even if another replaces it meanwhile.

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
        self._candidate: Candidate | None = None
        self._replacing = threading.Lock()
        self._wake = threading.Event()
        self._closing = threading.Event()
        self._last_request = self._next_pass = float("-inf")  # by time.monotonic
        self._thread = threading.Thread(target=self._work, name="shadow", daemon=True)

    @property
    def classifier(self) -> Classifier | None:
        candidate = self._candidate
        return candidate.classifier if candidate else None

    def replace(self, classifier: Classifier | None) -> Classifier | None:
        """Switches to another candidate, or to none, with new counts; returns the former."""
        with self._replacing:
            former, self._candidate = self._candidate, Candidate(classifier) if classifier else None
        return former.classifier if former else None

    def release(self, version: str) -> Classifier | None:
        """The candidate's model, which then serves elsewhere; None, and no change, if it has another version."""
        with self._replacing:
            candidate = self._candidate
            if candidate is None or candidate.classifier.weights.version != version:
                return None
            self._candidate = None
        return candidate.classifier

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
        candidate = self._candidate
        if candidate is None or random.random() >= self._sample:  # noqa: S311
            return
        room = max(0, MAX_PENDING - len(candidate.pending))
        is_same_size = candidate.classifier.input_size == classifier.input_size
        pairs = [pair for pair in zip(files, decoded, strict=True) if isinstance(pair[1], DecodedImage)][:room]
        for (file, image), score in zip(pairs, scores, strict=False):
            source = image if is_same_size else file
            if isinstance(source, (bytes, DecodedImage)):
                candidate.pending.append(Sample(source, classifier.classes, score.probabilities))
        self._wake.set()

    def report(self) -> dict[str, Any] | None:
        """What `GET /model` shows: agreement with the model that serves, by its labels, and time per image."""
        if (candidate := self._candidate) is None:
            return None
        weights = candidate.classifier.weights
        counts = {label: tuple(count) for label, count in sorted(candidate.counts.items())}
        images, agreeing = (sum(count[i] for count in counts.values()) for i in (0, 1))
        return {
            "name": weights.card.name,
            "version": weights.version,
            "sample": self._sample,
            "images": images,
            "agreement": _share(agreeing, images),
            "classes": {
                label: {"images": count, "agreement": _share(same, count)} for label, (count, same) in counts.items()
            },
            "ms_per_image": round(candidate.seconds / images * 1e3, 3) if images else None,
        }

    def _work(self) -> None:
        lower_priority()
        while not self._closing.is_set():
            self._wake.wait()
            self._wake.clear()
            while (candidate := self._candidate) and candidate.pending and not self._closing.is_set():
                if self._has_time():
                    self._run_next(candidate)
                else:
                    self._closing.wait(POLL_S)
            del candidate  # an idle thread keeps no model

    def _has_time(self) -> bool:
        now = time.monotonic()
        return now >= self._next_pass or (now - self._last_request > IDLE_S and not self._is_busy())

    def _run_next(self, candidate: Candidate) -> None:
        start = time.monotonic()
        try:
            self._compare(candidate, start)
        except Exception:
            logger.exception("the shadow failed and is off")
            with self._replacing:
                if self._candidate is candidate:
                    self._candidate = None
        end = time.monotonic()
        self._next_pass = end + (end - start) * (1 / BUSY_SHARE - 1)

    def _compare(self, candidate: Candidate, start: float) -> None:
        """Runs some of the samples and counts the agreement."""
        classifier, pending = candidate.classifier, candidate.pending
        samples = [pending.popleft() for _ in range(min(MAX_BATCH, len(pending)))]
        decoded = [(sample, self._decode(sample.source, classifier.input_size)) for sample in samples]
        images = [(sample, image) for sample, image in decoded if image is not None]
        if not images:
            return
        scores = classifier([image for _, image in images], exclusive=False)
        seconds = time.monotonic() - start
        predicted = [classifier.classes[int(score.probabilities.argmax())] for score in scores]
        labels = [(sample.label, label == sample.label) for (sample, _), label in zip(images, predicted, strict=True)]
        candidate.count(labels, seconds)
        self._on_pass(labels, seconds)

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
