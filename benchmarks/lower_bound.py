"""The least that a request can cost on this machine."""

from math import isnan
from typing import NamedTuple

from benchmarks.components import ComponentCosts
from benchmarks.measurement import Measurement
from benchmarks.payloads import IMAGES_PER_BULK_REQUEST


class CpuSplit(NamedTuple):
    """CPU time per image in microseconds; `other` is what the components do not explain."""

    parse: float
    decode: float
    network: float
    other: float


class LowerBound:
    """Sums of component costs and of a bare ASGI application's measurements."""

    def __init__(self, costs: ComponentCosts, bare: list[Measurement], cpus: int) -> None:
        self.costs = costs
        self.bare = bare
        self.cpus = cpus
        self._bare = {(each.load.images, each.load.concurrency): each for each in bare}

    def p50_ms(self) -> float:
        """Of a lone client: bare response, parsing, decoding and the network at batch 1, in sequence."""
        parts_ms = (self.costs.parse_us + self.costs.decode_us) / 1e3 + 1e3 / self.costs.throughput[1]
        return self._bare[1, 1].p50_ms + parts_ms

    def images_per_s(self, images: int) -> float:
        """All CPUs busy with load generator, bare HTTP, parsing, decoding and the network."""
        bare = self._bare[images, 64 if images == 1 else 16]
        network_us = self.cpus / self.costs.peak_throughput * 1e6
        http_us = bare.server_cpu_us + bare.client_cpu_us
        return self.cpus * 1e6 / (http_us + self.costs.parse_us + self.costs.decode_us + network_us)

    def share(self, measurement: Measurement) -> float | None:
        """The bound's latency over p50 for a lone client, else images/s over the bound; None without a bound."""
        load = measurement.load
        if load.request == "bare ASGI" or not load.concurrency or isnan(measurement.p50_ms):
            return None
        if load.concurrency > 1:
            return measurement.images_per_s / self.images_per_s(load.images)
        return self.p50_ms() / measurement.p50_ms if load.images == 1 else None

    def cpu_split(self, measurement: Measurement) -> CpuSplit:
        load = measurement.load
        batch = 1 if load.concurrency == load.images == 1 else IMAGES_PER_BULK_REQUEST
        parts = self.costs.parse_us, self.costs.decode_us, self.cpus / self.costs.throughput[batch] * 1e6
        return CpuSplit(*parts, measurement.server_cpu_us - sum(parts))
