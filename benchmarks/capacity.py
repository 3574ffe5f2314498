"""Latency against load for several replicas, and the replicas, network and cost for a rate. All by calculation.

    python -m benchmarks.capacity [--images 64 --images-per-s 1184] [--total 1e6]

The defaults are figures of docs/benchmarks.md: the bundled cascade on two Zen 4 cores (batches of one, 64 clients of
one image), and the CPU time of HTTP, form and decoding on the AMX machine. Measure your own replica first.
"""

import argparse
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from math import ceil

from app.engines.batch_cost import BatchCost
from benchmarks import payloads
from benchmarks.replica_simulation import POLICIES, Load, Result, Service, simulate

REPLICAS = (1, 10, 100)
LOADS = (0.3, 0.5, 0.7, 0.8, 0.9, 0.95)
REQUESTS_PER_REPLICA, MIN_REQUESTS = 2_000, 50_000
POISSON = Load(rate=1.0)  # `run` sets rate and images
CASES = {
    "1 balancer": POISSON,
    "10 balancers": replace(POISSON, balancers=10),
    "bursts of 100": replace(POISSON, burst=100),
    "a tenth of the replicas at half speed": replace(POISSON, slow=REPLICAS[-1] // 10),
}


@dataclass(frozen=True)
class Plan:
    """`total` images/s on replicas of `cores` that do `images_per_s` each, at a share `utilization` of it.

    `request_bytes` and `response_bytes` are those of a request of `images`. `price` is that of a core for an hour.
    """

    total: float
    images: int
    images_per_s: float
    utilization: float
    cores: float
    price: float
    request_bytes: float
    response_bytes: float
    latency_s: float

    @property
    def replicas(self) -> int:
        return ceil(self.total / (self.images_per_s * self.utilization))

    @property
    def requests_per_s(self) -> float:
        return self.total / self.images

    def rows(self) -> Iterable[tuple[str, str]]:
        """Names and values, with their formulas."""
        rate, cores = self.requests_per_s, self.replicas * self.cores
        cost = cores * self.price
        yield "requests/s = total / images", f"{rate:,.0f}"
        yield "replicas = total / (images/s x utilization)", f"{self.replicas:,}"
        yield f"cores = replicas x {self.cores:g}", f"{cores:,.0f}"
        yield f"cost an hour = cores x {self.price:g}", f"{cost:,.2f}"
        yield "cost of a million images", f"{cost / 3600 / self.total * 1e6:.3f}"
        yield f"received Gbit/s = requests/s x {self.request_bytes:,.0f} bytes", gigabits(rate * self.request_bytes)
        yield f"sent Gbit/s = requests/s x {self.response_bytes:,.0f} bytes", gigabits(rate * self.response_bytes)
        both = rate * (self.request_bytes + self.response_bytes) / self.replicas
        yield "Mbit/s of a replica, both ways", f"{both * 8 / 1e6:.1f}"
        yield "requests in progress = requests/s x mean latency", f"{rate * self.latency_s:,.0f}"


def gigabits(bytes_per_s: float) -> str:
    return f"{bytes_per_s * 8 / 1e9:.2f}"


def service(arguments: argparse.Namespace) -> Service:
    """The engine's cost by batch size, so that full batches give the measured images/s of the whole replica."""
    largest = arguments.max_batch
    cost = BatchCost.fit(1 / arguments.one_image_per_s, largest / arguments.images_per_s, largest)
    return Service(
        loop_s=lambda images: 1e-6 * (arguments.request_us + images * arguments.decode_us),
        batch_s=lambda images: cost.seconds(1, images),
        max_batch=largest,
    )


def run(replica: Service, replicas: int, share: float, images: int, seed: int, load: Load = POISSON) -> Result:
    """The load at a share of the replicas' capacity."""
    rate = share * replicas * replica.images_per_s(images) / images
    requests = max(MIN_REQUESTS, REQUESTS_PER_REPLICA * replicas) // images + 1000
    return simulate(replica, replicas, replace(load, rate=rate, images=images), requests, seed)


def cell(result: Result) -> str:
    return f"{result.percentile_ms(0.5):.1f} / {result.percentile_ms(0.99):.1f}"


def load_table(replica: Service, images: int, seed: int) -> list[Sequence[str]]:
    """p50 and p99 by load and replicas behind one balancer, and the busy share of the engines of the fewest."""
    rows: list[Sequence[str]] = [["load", *(f"replicas: {count}" for count in REPLICAS), "engine busy"]]
    for share in LOADS:
        results = [run(replica, count, share, images, seed) for count in REPLICAS]
        rows.append([f"{share:.0%}", *map(cell, results), f"{results[0].busy:.0%}"])
    return rows


def policy_table(replica: Service, images: int, share: float, seed: int) -> list[Sequence[str]]:
    """p50 and p99 by policy with the most replicas."""
    rows: list[Sequence[str]] = [["policy", *CASES]]
    for policy in POLICIES:
        loads = [replace(case, policy=policy) for case in CASES.values()]
        results = [run(replica, REPLICAS[-1], share, images, seed, load) for load in loads]
        rows.append([policy, *map(cell, results)])
    return rows


def table(rows: Sequence[Sequence[str]]) -> str:
    """Markdown; the first row is the head."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "| --- |" + " ---: |" * (len(rows[0]) - 1), *lines[1:]])


def plan(arguments: argparse.Namespace, replica: Service) -> Plan:
    forms = payloads.forms(payloads.image_files(None), arguments.images)
    result = run(replica, REPLICAS[-1], arguments.utilization, arguments.images, arguments.seed)
    return Plan(
        arguments.total,
        arguments.images,
        replica.images_per_s(arguments.images),
        arguments.utilization,
        arguments.cores,
        arguments.price,
        arguments.request_bytes or sum(map(len, forms)) / len(forms),
        arguments.response_bytes or 389 + 228 * arguments.images,  # measured, see docs/capacity.md
        float(result.latencies.mean()),
    )


def parser() -> argparse.ArgumentParser:
    flags = argparse.ArgumentParser(prog="python -m benchmarks.capacity", description=(__doc__ or "").splitlines()[0])
    number = flags.add_argument
    number("--images-per-s", type=float, default=891, help="images/s of a replica at full load [%(default)g]")
    number("--one-image-per-s", type=float, default=473, help="images/s of the engine in batches of 1 [%(default)g]")
    number("--max-batch", type=int, default=64, help="images [%(default)s]")
    number("--images", type=int, default=1, help="images in a request [%(default)s]")
    number("--request-us", type=float, default=31, help="CPU time of HTTP and form for a request [%(default)g]")
    number("--decode-us", type=float, default=75, help="CPU time of decoding for an image [%(default)g]")
    number("--utilization", type=float, default=0.7, help="aim, as a share of the images/s [%(default)g]")
    number("--total", type=float, default=1e6, help="images/s of all replicas together [%(default)g]")
    number("--cores", type=float, default=2, help="of a replica [%(default)g]")
    number("--price", type=float, default=0.04, help="of a core for an hour, an assumption [%(default)g]")
    number("--request-bytes", type=float, help="of a request with its head [that of the benchmark's forms]")
    number("--response-bytes", type=float, help="of a response with its head [389 + 228 for each image]")
    number("--seed", type=int, default=0, help="[%(default)s]")
    number("--plan-only", action="store_true", help="leave out the tables of the simulation")
    return flags


def main(argv: list[str] | None = None) -> None:
    arguments = parser().parse_args(argv)
    if arguments.images_per_s < arguments.one_image_per_s:
        sys.exit("error: --images-per-s is lower than --one-image-per-s")
    replica = service(arguments)
    if not arguments.plan_only:
        print("p50 / p99 in ms, least outstanding requests:", end="\n\n")
        print(table(load_table(replica, arguments.images, arguments.seed)), end="\n\n")
        print(f"p50 / p99 in ms, {REPLICAS[-1]} replicas at {arguments.utilization:.0%}:", end="\n\n")
        print(table(policy_table(replica, arguments.images, arguments.utilization, arguments.seed)), end="\n\n")
    print(f"{arguments.total:,.0f} images/s at {arguments.utilization:.0%}:", end="\n\n")
    print(table([("", "value"), *plan(arguments, replica).rows()]))


if __name__ == "__main__":
    main()
