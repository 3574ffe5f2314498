"""The simulation against queueing theory: Poisson arrivals, one image a batch, no event loop."""

import random
from math import sqrt

import numpy as np
import pytest

from benchmarks.replica_simulation import POLICIES, Load, Result, RoundRobin, Service, Simulation, simulate
from benchmarks.replica_simulation import least_outstanding as least

REQUESTS = 60_000
BATCHING = Service(loop_s=lambda images: 0.0, batch_s=lambda images: 0.5 + 0.5 * images, max_batch=8)


def single(exponential: bool) -> Service:
    """One image/s, with exponential or constant times."""
    chance = random.Random(1)  # noqa: S311
    return Service(lambda images: 0.0, lambda images: chance.expovariate(1) if exponential else 1.0, max_batch=1)


def mean(service: Service, replicas: int, load: Load) -> float:
    return float(simulate(service, replicas, load, REQUESTS).latencies.mean())


@pytest.mark.parametrize("rate", [0.3, 0.6])
def test_exponential_service_agrees_with_m_m_1(rate: float) -> None:
    assert mean(single(exponential=True), 1, Load(rate)) == pytest.approx(1 / (1 - rate), rel=0.05)


@pytest.mark.parametrize("rate", [0.3, 0.6])
def test_constant_service_agrees_with_m_d_1(rate: float) -> None:
    assert mean(single(exponential=False), 1, Load(rate)) == pytest.approx(1 + rate / (2 * (1 - rate)), rel=0.05)


def test_tail_agrees_with_m_m_1() -> None:
    result = simulate(single(exponential=True), 1, Load(0.5), REQUESTS)
    assert result.percentile_ms(0.99) == pytest.approx(1e3 * np.log(100) / 0.5, rel=0.1)
    assert result.busy == pytest.approx(0.5, rel=0.03)


def test_random_choice_splits_into_independent_queues() -> None:
    load = Load(5.0, policy="random")
    assert mean(single(exponential=False), 10, load) == pytest.approx(1 + 0.5 / (2 * 0.5), rel=0.05)


def test_round_robin_agrees_with_erlang_arrivals() -> None:
    """Two replicas in turn: E2/M/1, whose wait follows from the root of x = (2 rate / (2 rate + 1 - x))^2."""
    rate, root = 0.6, 0.5
    for _ in range(200):
        root = (2 * rate / (2 * rate + 1 - root)) ** 2
    load = Load(2 * rate, policy="round robin")
    assert mean(single(exponential=True), 2, load) == pytest.approx(1 / (1 - root), rel=0.06)


@pytest.mark.slow
def test_better_informed_policies_are_faster() -> None:
    means = [mean(single(exponential=True), 20, Load(17.0, policy=policy)) for policy in POLICIES]
    assert means == sorted(means)
    assert list(POLICIES) == ["least outstanding", "two choices", "round robin", "random"]


def test_several_balancers_see_their_own_requests_only() -> None:
    one, many = (mean(single(exponential=False), 20, Load(17.0, balancers=count)) for count in (1, 50))
    assert many > 1.5 * one


def test_bursts_are_slower_than_single_arrivals() -> None:
    """M/D/1 with bursts of two: half a service time more before the queue's own growth."""
    assert mean(single(exponential=False), 1, Load(0.5, burst=2)) > mean(single(exponential=False), 1, Load(0.5)) + 0.5


def test_overload_fills_the_batches() -> None:
    result = simulate(BATCHING, 1, Load(10.0), 4000)
    assert result.busy == pytest.approx(1.0, abs=0.01)
    assert result.latencies[-1] == pytest.approx(4000 * (4.5 / 8 - 0.1), rel=0.05)
    assert BATCHING.images_per_s(1) == pytest.approx(8 / 4.5)


def test_batching_serves_more_than_single_images() -> None:
    assert simulate(BATCHING, 1, Load(1.5), 20_000).percentile_ms(0.99) < 15_000  # one a time serves 1.0 at most


def test_large_requests_are_split_over_batches() -> None:
    service = Service(lambda images: 0.1 * images, BATCHING.batch_s, max_batch=8)
    result = Simulation(service, 1, Load(1.0, images=20), seed=0).run(iter([0.0]))
    assert result.latencies == pytest.approx([2.0 + 4.5 + 4.5 + 2.5])
    assert service.images_per_s(20) == pytest.approx(8 / 4.5)
    assert Service(lambda images: 1.0 * images, BATCHING.batch_s, 8).images_per_s(20) == 1.0


def test_event_loop_handles_one_request_at_a_time() -> None:
    service = Service(lambda images: 2.0, lambda images: 0.5, max_batch=8)
    result = Simulation(service, 1, Load(1.0), seed=0).run(iter([0.0, 1.0]))
    assert result.latencies == pytest.approx([2.5, 3.5])


def test_same_seed_gives_the_same_result() -> None:
    def run(seed: int) -> Result:
        return simulate(BATCHING, 3, Load(3.0, burst=4, balancers=2), 2000, seed)

    assert np.array_equal(run(1).latencies, run(1).latencies)
    assert not np.array_equal(run(1).latencies, run(2).latencies)


def test_arrivals_have_the_rate() -> None:
    for burst in (1, 7):
        times = list(Load(100.0, burst=burst).arrivals(20_000, 0))
        assert len(times) == 20_000
        assert times[-1] == pytest.approx(200, rel=0.2 / sqrt(burst) + 0.02 * sqrt(burst))


def test_slow_replica_takes_twice_as_long() -> None:
    result = Simulation(single(exponential=False), 2, Load(1.0, slow=1), 0).run(iter([0.0, 0.0]))
    assert sorted(result.latencies) == [1.0, 2.0]


def test_ties_are_broken_evenly() -> None:
    chance = random.Random(0)  # noqa: S311
    chosen = [least([1, 0, 0, 5, 0], chance) for _ in range(3000)]
    assert set(chosen) == {1, 2, 4}


def test_round_robin_starts_anywhere() -> None:
    chance = random.Random(0)  # noqa: S311
    turns = [[in_turn([0, 0, 0], chance) for _ in range(4)] for in_turn in (RoundRobin() for _ in range(50))]
    assert sorted({tuple(turn) for turn in turns}) == [(0, 1, 2, 0), (1, 2, 0, 1), (2, 0, 1, 2)]
