"""Counts and durations since the start, in the form of Triton's statistics extension."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Duration:
    """A count of events, and their total time."""

    def __init__(self) -> None:
        self.count = 0
        self.ns = 0

    def add(self, ns: int) -> None:
        self.count += 1
        self.ns += ns

    def as_json(self) -> dict[str, int]:
        return {"count": self.count, "ns": self.ns}


class Requests:
    """Inference requests for one model name; belongs to the event loop."""

    def __init__(self) -> None:
        self.last_ms = 0
        self.success, self.fail = Duration(), Duration()
        self.queue, self.compute_input, self.compute_infer, self.compute_output = (Duration() for _ in range(4))

    @contextmanager
    def counting(self) -> Iterator[None]:
        start, outcome = time.perf_counter_ns(), self.fail
        try:
            yield
            outcome = self.success
            self.last_ms = time.time_ns() // 1_000_000
        finally:
            outcome.add(time.perf_counter_ns() - start)

    def as_json(self) -> dict[str, dict[str, int]]:
        names = ("success", "fail", "queue", "compute_input", "compute_infer", "compute_output")
        durations = {name: getattr(self, name).as_json() for name in names}
        return {**durations, "cache_hit": Duration().as_json(), "cache_miss": Duration().as_json()}


class Statistics:
    """Requests by model name, and the batches of the one network behind all names and /predict."""

    def __init__(self) -> None:
        self.requests: defaultdict[str, Requests] = defaultdict(Requests)
        self._batches: defaultdict[int, Duration] = defaultdict(Duration)

    def observe_batch(self, size: int, seconds: float) -> None:
        """Called by an inference thread."""
        self._batches[size].add(int(seconds * 1e9))

    def of(self, name: str, version: str) -> dict[str, Any]:
        requests, batches = self.requests[name], sorted(self._batches.items())
        return {
            "name": name,
            "version": version,
            "last_inference": requests.last_ms,
            "inference_count": sum(size * duration.count for size, duration in batches),
            "execution_count": sum(duration.count for _, duration in batches),
            "inference_stats": requests.as_json(),
            "response_stats": {},
            "batch_stats": [_of_size(size, duration) for size, duration in batches],
            "memory_usage": [],
        }


def _of_size(size: int, duration: Duration) -> dict[str, Any]:
    """Only inference runs in batches; decoding and encoding belong to requests."""
    none = Duration().as_json()
    return {"batch_size": size, "compute_input": none, "compute_infer": duration.as_json(), "compute_output": none}
