"""How often and how long, since the start, as the protocol's statistics extension tells it."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Duration:
    """How often something was done, and the time of all."""

    def __init__(self) -> None:
        self.count = 0
        self.ns = 0

    def add(self, ns: int) -> None:
        self.count += 1
        self.ns += ns

    def as_json(self) -> dict[str, int]:
        return {"count": self.count, "ns": self.ns}


class Requests:
    """The inferences asked of one model name; belongs to the event loop."""

    def __init__(self) -> None:
        self.last_ms = 0
        self.success, self.fail = Duration(), Duration()
        self.queue, self.compute_input, self.compute_infer, self.compute_output = (Duration() for _ in range(4))

    @contextmanager
    def counting(self) -> Iterator[None]:
        begun, outcome = time.perf_counter_ns(), self.fail
        try:
            yield
            outcome = self.success
            self.last_ms = time.time_ns() // 1_000_000
        finally:
            outcome.add(time.perf_counter_ns() - begun)

    def as_json(self) -> dict[str, dict[str, int]]:
        names = ("success", "fail", "queue", "compute_input", "compute_infer", "compute_output")
        durations = {name: getattr(self, name).as_json() for name in names}
        return {**durations, "cache_hit": Duration().as_json(), "cache_miss": Duration().as_json()}


class Statistics:
    """Requests by model name, and the passes of the one network behind all names and /predict."""

    def __init__(self) -> None:
        self.requests: defaultdict[str, Requests] = defaultdict(Requests)
        self._passes: defaultdict[int, Duration] = defaultdict(Duration)

    def observe_pass(self, size: int, seconds: float) -> None:
        """Called by the inference thread."""
        self._passes[size].add(int(seconds * 1e9))

    def of(self, name: str, version: str) -> dict[str, Any]:
        requests, passes = self.requests[name], sorted(self._passes.items())
        return {
            "name": name,
            "version": version,
            "last_inference": requests.last_ms,
            "inference_count": sum(size * duration.count for size, duration in passes),
            "execution_count": sum(duration.count for _, duration in passes),
            "inference_stats": requests.as_json(),
            "response_stats": {},
            "batch_stats": [_of_size(size, duration) for size, duration in passes],
            "memory_usage": [],
        }


def _of_size(size: int, duration: Duration) -> dict[str, Any]:
    """Only the network runs by batches; images come and answers go by requests."""
    none = Duration().as_json()
    return {"batch_size": size, "compute_input": none, "compute_infer": duration.as_json(), "compute_output": none}
