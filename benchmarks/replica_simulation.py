"""Discrete-event simulation of replicas behind load balancers.

A request passes the event loop of its replica, one at a time, then the engine, which runs all images that wait as one
batch, as the service does. Batches on several streams, refusals and the network are left out.
"""

import random
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from heapq import heappop, heappush

import numpy as np
from numpy.typing import NDArray

Seconds = Callable[[int], float]
Choose = Callable[[list[int], random.Random], int]

WARM_UP = 0.1  # share of the requests that no figure counts: they find empty replicas


def least_outstanding(outstanding: list[int], chance: random.Random) -> int:
    """The replica with the fewest requests in progress; the search for one starts at a random one."""
    fewest, start = min(outstanding), chance.randrange(len(outstanding))
    try:
        return outstanding.index(fewest, start)
    except ValueError:
        return outstanding.index(fewest)


def two_choices(outstanding: list[int], chance: random.Random) -> int:
    """The better of two random replicas (Mitzenmacher 2001)."""
    one, other = chance.randrange(len(outstanding)), chance.randrange(len(outstanding))
    return one if outstanding[one] <= outstanding[other] else other


def at_random(outstanding: list[int], chance: random.Random) -> int:
    return chance.randrange(len(outstanding))


class RoundRobin:
    """The next replica in turn, whatever its load; the first is a random one."""

    def __init__(self) -> None:
        self._next: int | None = None

    def __call__(self, outstanding: list[int], chance: random.Random) -> int:
        start = chance.randrange(len(outstanding)) if self._next is None else self._next
        self._next = (start + 1) % len(outstanding)
        return start


POLICIES: dict[str, Callable[[], Choose]] = {
    "least outstanding": lambda: least_outstanding,
    "two choices": lambda: two_choices,
    "round robin": RoundRobin,
    "random": lambda: at_random,
}


@dataclass(frozen=True)
class Service:
    """A replica: seconds of the event loop for a request of n images, and of the engine for a batch of n images."""

    loop_s: Seconds
    batch_s: Seconds
    max_batch: int

    def images_per_s(self, images: int) -> float:
        """The most images/s in requests of `images`: the slower one of event loop and full batches."""
        return min(self.max_batch / self.batch_s(self.max_batch), images / max(self.loop_s(images), 1e-12))


@dataclass(frozen=True)
class Load:
    """`rate` requests/s of `images` images; bursts of `burst` requests arrive as a Poisson process.

    Each request comes through one of `balancers`, at random, which counts its own requests in progress only. On the
    first `slow` replicas everything takes twice as long.
    """

    rate: float
    images: int = 1
    burst: int = 1
    policy: str = "least outstanding"
    balancers: int = 1
    slow: int = 0

    def arrivals(self, requests: int, seed: int) -> Iterator[float]:
        """Ascending times in seconds."""
        bursts = -(-requests // self.burst)
        times = np.random.default_rng(seed).exponential(self.burst / self.rate, bursts).cumsum()
        return iter(times.repeat(self.burst)[:requests].tolist())


@dataclass(frozen=True)
class Result:
    """Seconds from arrival to response, and the share of time in which an engine ran."""

    latencies: NDArray[np.float64]
    busy: float

    def percentile_ms(self, share: float) -> float:
        return float(np.quantile(self.latencies, share) * 1e3)


class Replica:
    """`waiting` has a request's number and its images that no batch has yet."""

    __slots__ = ("batch", "busy_s", "loop_free", "slowdown", "waiting")

    def __init__(self, slowdown: int) -> None:
        self.slowdown = slowdown
        self.loop_free = 0.0
        self.waiting: deque[list[int]] = deque()
        self.batch: list[int] | None = None  # requests whose last images run; None while idle
        self.busy_s = 0.0

    def start_batch(self, service: Service) -> float:
        """Runs what waits; the duration of the batch in seconds."""
        count, self.batch = 0, []
        while self.waiting and count < service.max_batch:
            first = self.waiting[0]
            taken = min(first[1], service.max_batch - count)
            count += taken
            first[1] -= taken
            if not first[1]:
                self.batch.append(self.waiting.popleft()[0])
        seconds = self.slowdown * service.batch_s(count)
        self.busy_s += seconds
        return seconds


class Simulation:
    def __init__(self, service: Service, replicas: int, load: Load, seed: int) -> None:
        self._service, self._load = service, load
        self._replicas = [Replica(2 if index < load.slow else 1) for index in range(replicas)]
        self._chance = random.Random(seed)
        self._choose = [POLICIES[load.policy]() for _ in range(load.balancers)]
        self._outstanding = [[0] * replicas for _ in range(load.balancers)]
        self._events: list[tuple[float, int, int]] = []  # time, replica, request; request -1: the batch has ended
        self._arrived: list[float] = []
        self._balancer: list[int] = []  # by request
        self._ended: dict[int, float] = {}  # by request

    def run(self, arrivals: Iterator[float]) -> Result:
        for time in arrivals:
            self._advance(time)
            self._arrive(time)
        self._advance(float("inf"))
        busy = sum(replica.busy_s for replica in self._replicas) / len(self._replicas) / max(self._ended.values())
        counted = range(int(WARM_UP * len(self._arrived)), len(self._arrived))
        return Result(np.array([self._ended[i] - self._arrived[i] for i in counted]), busy)

    def _arrive(self, time: float) -> None:
        balancer = self._chance.randrange(len(self._choose))
        index = self._choose[balancer](self._outstanding[balancer], self._chance)
        self._outstanding[balancer][index] += 1
        replica = self._replicas[index]
        loop_s = replica.slowdown * self._service.loop_s(self._load.images)
        replica.loop_free = max(time, replica.loop_free) + loop_s
        heappush(self._events, (replica.loop_free, index, len(self._arrived)))
        self._arrived.append(time)
        self._balancer.append(balancer)

    def _advance(self, until: float) -> None:
        while self._events and self._events[0][0] <= until:
            time, index, request = heappop(self._events)
            replica = self._replicas[index]
            if request >= 0:
                replica.waiting.append([request, self._load.images])
                start = replica.batch is None
            else:
                self._respond(time, index, replica.batch or [])
                replica.batch, start = None, bool(replica.waiting)
            if start:
                heappush(self._events, (time + replica.start_batch(self._service), index, -1))

    def _respond(self, time: float, index: int, requests: list[int]) -> None:
        for request in requests:
            self._ended[request] = time
            self._outstanding[self._balancer[request]][index] -= 1


def simulate(service: Service, replicas: int, load: Load, requests: int = 50_000, seed: int = 0) -> Result:
    return Simulation(service, replicas, load, seed).run(load.arrivals(requests, seed))
