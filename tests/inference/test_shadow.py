"""The shadow with stand-ins for the networks: what it counts, when it runs, what it leaves alone."""

import threading
import time
import weakref
from collections.abc import Sequence
from types import SimpleNamespace

import numpy as np
import pytest

from app.errors import UnsupportedImage
from app.inference.classifier import Scores
from app.inference.shadow import BUSY_SHARE, MAX_PENDING, Shadow
from app.model.preprocessing import DecodedImage, Limits
from tests.support.images import SMALL
from tests.support.subprocesses import wait_until

LIMITS = Limits(32, 25_000_000)


class Candidate:
    """Predicts `label` for every image; takes `seconds` a pass."""

    def __init__(self, label: int = 0, input_size: int = 32, seconds: float = 0.0) -> None:
        self.input_size = input_size
        self.classes = ["cat", "dog"]
        self.weights = SimpleNamespace(card=SimpleNamespace(name="new"), version="12345678")
        self.passes: list[tuple[float, float, int]] = []
        self._row = np.eye(2, dtype=np.float32)[label]
        self._seconds = seconds

    def __call__(self, items: Sequence[DecodedImage], exclusive: bool = True) -> list[Scores]:
        start = time.monotonic()
        assert not exclusive
        assert {image.pixels.shape for image in items} == {(self.input_size, self.input_size, 3)}
        threading.Event().wait(self._seconds)
        self.passes.append((start, time.monotonic(), len(items)))
        return [Scores(self._row, 0)] * len(items)


class Broken(Candidate):
    def __call__(self, items: Sequence[DecodedImage], exclusive: bool = True) -> list[Scores]:
        raise RuntimeError("no memory")


class Blocked(Candidate):
    """Ends a pass when `release` is set, with an error if it is `broken`."""

    def __init__(self, broken: bool) -> None:
        super().__init__()
        self.broken = broken
        self.started, self.release = threading.Event(), threading.Event()

    def __call__(self, items: Sequence[DecodedImage], exclusive: bool = True) -> list[Scores]:
        self.started.set()
        self.release.wait(30)
        if self.broken:
            raise RuntimeError("no memory")
        return super().__call__(items, exclusive)


SERVING = Candidate()
IMAGE = DecodedImage(np.zeros((32, 32, 3), np.uint8), None)
CAT, DOG = (Scores(np.eye(2, dtype=np.float32)[label], 0) for label in (0, 1))


def waiting(shadow: Shadow) -> int:
    return len(shadow._candidate.pending)


class Running:
    def __init__(self, candidate: Candidate | None, busy: bool = False, sample: float = 1.0) -> None:
        self.shadow = Shadow(LIMITS, sample, lambda: busy)
        self.shadow.replace(candidate)

    def __enter__(self) -> Shadow:
        self.shadow.start()
        return self.shadow

    def __exit__(self, *exc: object) -> None:
        self.shadow.close(5)


def test_agreement_is_counted_by_the_label_that_serves() -> None:
    with Running(Candidate()) as shadow:
        files = [SMALL, b"bad", SMALL, SMALL]
        shadow.offer(SERVING, files, [IMAGE, UnsupportedImage("no image"), IMAGE, IMAGE], [CAT, DOG, CAT])
        wait_until(lambda: shadow.report()["images"] == 3)
        report = shadow.report()
    assert report["classes"] == {"cat": {"images": 2, "agreement": 1.0}, "dog": {"images": 1, "agreement": 0.0}}
    assert (report["name"], report["version"], report["agreement"]) == ("new", "12345678", 0.6667)
    assert report["ms_per_image"] >= 0


def test_files_are_decoded_again_for_another_input_size() -> None:
    with Running(Candidate(input_size=48)) as shadow:
        shadow.offer(SERVING, [SMALL, IMAGE], [IMAGE, IMAGE], [CAT, CAT])  # the second came as pixels
        wait_until(lambda: shadow.report()["images"] == 1)


@pytest.mark.slow
def test_a_busy_service_leaves_it_a_small_share_of_time() -> None:
    candidate = Candidate(seconds=0.01)
    with Running(candidate, busy=True) as shadow:
        deadline = time.monotonic() + 60
        while len(candidate.passes) < 3:
            assert time.monotonic() < deadline
            shadow.offer(SERVING, [SMALL], [IMAGE], [CAT])
            threading.Event().wait(0.002)
    (first, *_), (last, *_) = candidate.passes[0], candidate.passes[-1]
    assert len(candidate.passes) > 1
    assert sum(stop - start for start, stop, _ in candidate.passes[:-1]) <= BUSY_SHARE * (last - first)


def test_an_idle_service_lets_it_run_all_samples() -> None:
    candidate = Candidate()
    with Running(candidate) as shadow:
        for _ in range(40):
            shadow.offer(SERVING, [SMALL], [IMAGE], [CAT])
        wait_until(lambda: shadow.report()["images"] == 40)
    assert max(size for *_, size in candidate.passes) == 8


def test_waiting_samples_are_bounded() -> None:
    shadow = Shadow(LIMITS, 1.0, lambda: True)
    shadow.replace(Candidate())
    for _ in range(10):
        shadow.offer(SERVING, [SMALL] * 50, [IMAGE] * 50, [CAT] * 50)
    assert waiting(shadow) == MAX_PENDING


@pytest.mark.parametrize(("sample", "low", "high"), [(1.0, 60, 60), (0.5, 10, 50), (0.001, 0, 5)])
def test_the_sample_is_a_share_of_the_requests(sample: float, low: int, high: int) -> None:
    shadow = Shadow(LIMITS, sample, lambda: True)
    shadow.replace(Candidate())
    for _ in range(60):
        shadow.offer(SERVING, [SMALL], [IMAGE], [CAT])
    assert low <= waiting(shadow) <= high


def test_a_shadow_that_fails_is_off(caplog: pytest.LogCaptureFixture) -> None:
    with Running(Broken()) as shadow:
        shadow.offer(SERVING, [SMALL], [IMAGE], [CAT])
        wait_until(lambda: shadow.report() is None)
        shadow.offer(SERVING, [SMALL], [IMAGE], [CAT])
    assert caplog.messages == ["the shadow failed and is off"]


def test_another_candidate_begins_new_counts_and_frees_the_former() -> None:
    with Running(Candidate()) as shadow:
        shadow.offer(SERVING, [SMALL], [IMAGE], [CAT])
        wait_until(lambda: shadow.report()["images"] == 1)
        former = weakref.ref(shadow.classifier)
        shadow.replace(Candidate(label=1))
        assert shadow.report()["images"] == 0
        shadow.offer(SERVING, [SMALL], [IMAGE], [CAT])
        wait_until(lambda: shadow.report()["images"] == 1)
        assert shadow.report()["agreement"] == 0.0
        wait_until(lambda: former() is None)


@pytest.mark.parametrize("broken", [False, True])
def test_a_pass_of_the_former_candidate_leaves_the_new_one(broken: bool) -> None:
    former = Blocked(broken)
    with Running(former) as shadow:
        shadow.offer(SERVING, [SMALL], [IMAGE], [CAT])
        former.started.wait(30)
        shadow.replace(Candidate(label=1))
        former.release.set()
        shadow.offer(SERVING, [SMALL], [IMAGE], [CAT])
        wait_until(lambda: shadow.report()["images"] == 1)
        assert shadow.report()["agreement"] == 0.0


def test_a_candidate_of_another_version_is_not_released() -> None:
    shadow = Running(Candidate()).shadow
    assert shadow.release("87654321") is None
    assert shadow.classifier is not None
    assert shadow.release("12345678") is not None
    assert shadow.classifier is None
