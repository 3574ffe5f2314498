import json
from math import nan

import pytest

from benchmarks.components import ComponentCosts
from benchmarks.lower_bound import LowerBound
from benchmarks.measurement import Load, Measurement

COSTS = ComponentCosts(
    parse_us=10.0,
    decode_us=90.0,
    cold_latency_us=800.0,
    hand_over_us=60.0,
    engine="openvino",
    precision="int8",
    throughput={1: 1000.0, 64: 2000.0},
    concurrent_throughput={1: 1500.0, 64: 2500.0},
)


def measured(request: str, images: int, concurrency: int, rate: float, p50_ms: float = 1.0) -> Measurement:
    return Measurement(Load(request, images, concurrency), rate, p50_ms, p50_ms, 200.0, 100.0, 0, 0)


@pytest.fixture
def bound() -> LowerBound:
    bare = [measured("bare ASGI", 1, 1, 9000, p50_ms=0.1), measured("bare ASGI", 1, 64, 20_000)]
    return LowerBound(COSTS, bare, cpus=2)


def test_latency_bound_adds_the_components(bound: LowerBound) -> None:
    assert bound.p50_ms() == pytest.approx(0.1 + 0.01 + 0.09 + 1.0)
    assert bound.share(measured("form", 1, 1, 500, p50_ms=2.4)) == pytest.approx(0.5)


def test_throughput_bound_divides_the_cpus(bound: LowerBound) -> None:
    cpu_us = 300 + 10 + 90 + 2 / 2500 * 1e6
    assert bound.images_per_s(1) == pytest.approx(2e6 / cpu_us)
    assert bound.share(measured("form", 1, 64, 1e6 / cpu_us)) == pytest.approx(0.5)


def test_open_loops_and_bare_asgi_have_no_bound(bound: LowerBound) -> None:
    assert bound.share(measured("form", 1, 0, 500)) is None
    assert bound.share(bound.bare[1]) is None


def test_cpu_split_adds_up_to_the_servers_time(bound: LowerBound) -> None:
    split = bound.cpu_split(measured("form", 1, 64, 500))
    assert split.network == pytest.approx(1000)
    assert sum(split) == pytest.approx(200)


def test_measurement_without_a_response_is_null_in_json(bound: LowerBound) -> None:
    empty = Measurement(Load("form", 64, 16), 0.0, nan, nan, nan, nan, 0, 0)
    assert bound.share(empty) is None
    assert json.loads(json.dumps(empty.as_json(), allow_nan=False))["p50_ms"] is None
