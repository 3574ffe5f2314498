"""One load on one server, measured."""

import time
from collections.abc import Callable, Coroutine
from math import isnan, nan
from typing import Any, NamedTuple

import uvloop

from benchmarks.load import LoadResult
from benchmarks.server_process import ServerProcess

Drive = Callable[[], Coroutine[Any, Any, LoadResult]]


class Load(NamedTuple):
    """`concurrency` connections in a closed loop; 0: an open loop at `share` of the peak rate."""

    request: str  # form, raw, bare ASGI
    images: int  # per request
    concurrency: int
    share: float = 0.0

    def __str__(self) -> str:
        return f"closed, {self.concurrency}" if self.concurrency else f"open, {self.share:g} of the peak"


class Measurement(NamedTuple):
    """CPU time of the server and of the load generator is in microseconds per image.

    Times are NaN if no response came within the measurement.
    """

    load: Load
    requests_per_s: float
    p50_ms: float
    p99_ms: float
    server_cpu_us: float
    client_cpu_us: float
    rejected: int
    failed: int

    @property
    def images_per_s(self) -> float:
        return self.requests_per_s * self.load.images

    def as_json(self) -> dict[str, Any]:
        """Without NaN, which JSON does not have."""
        numbers = {name: value for name, value in self._asdict().items() if name != "load"}
        defined = {name: None if isnan(value) else value for name, value in numbers.items()}
        return {"load": {**self.load._asdict(), "name": str(self.load)}, **defined}


def measure(server: ServerProcess, load: Load, drive: Drive) -> Measurement:
    """Runs the load twice and measures the second run."""
    uvloop.run(drive())
    server_before, client_before = server.cpu_s(), time.process_time()
    result = uvloop.run(drive())
    server_s, client_s = server.cpu_s() - server_before, time.process_time() - client_before
    responses = result.statuses.total()
    us_per_image = 1e6 / (responses * load.images) if responses else nan
    return Measurement(
        load,
        result.rate,
        result.percentile_ms(0.5),
        result.percentile_ms(0.99),
        server_s * us_per_image,
        client_s * us_per_image,
        responses - result.statuses[200],
        result.failures,
    )
