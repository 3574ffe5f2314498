"""`python -m benchmarks.ray_replicas`: one and two replicas on Ray Serve, beside the plain service, in one run.

Needs the extra `ray`. Everything stays on loopback and shares the cores of this machine with the load.
"""

import argparse
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import uvloop

from app.settings import Settings
from benchmarks.client import Run, closed_loop, form
from benchmarks.serving import CONCURRENCY, MANY, ROOT, pictures, process, service

os.environ |= {
    "RAY_AUTH_MODE": "disabled",  # else Ray leaves a token in the home folder
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # keeps every port on loopback; read when ray is imported
    "RAY_USAGE_STATS_ENABLED": "0",
    "PYTHONPATH": str(ROOT),
}

import ray
from ray import serve

from deploy.ray_serve import replicas


class Load(NamedTuple):
    """So many connections, each of which sends its next request as soon as the last is answered."""

    images: int
    concurrency: int
    requests: list[bytes]


@contextmanager
def cluster(port: int) -> Iterator[None]:
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, _node_ip_address="127.0.0.1")
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    try:
        yield
    finally:
        serve.shutdown()
        ray.shutdown()


def loads(files: list[tuple[str, bytes]]) -> list[Load]:
    ones = [form([file]) for file in files]
    manies = [form(files[i : i + MANY]) for i in range(0, len(files), MANY)]
    return [Load(1, concurrency, ones) for concurrency in CONCURRENCY] + [Load(MANY, 16, manies)]


def measure(what: str, port: int, load: Load, seconds: float) -> None:
    run: Run = uvloop.run(closed_loop(port, load.requests, load.concurrency, seconds, warm_up_s=seconds))
    refused = run.statuses.total() - run.statuses[200]
    print(
        f"| {what} | {load.images} | {load.concurrency} | {run.rate:.0f} | {run.rate * load.images:.0f} | "
        f"{run.percentile(0.5):.1f} | {run.percentile(0.99):.1f} | {refused} | {run.failures} |",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.ray_replicas", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--data", type=Path, help="CIFAR-10 folder to take pictures from [the examples]")
    parser.add_argument("--seconds", type=float, default=4.0, help="of each measurement, after as long a warm-up [4]")
    parser.add_argument("--port", type=int, default=18099)
    arguments = parser.parse_args()
    every = loads(pictures(arguments.data))
    print("| served by | images a request | connections | requests/s | images/s | p50 ms | p99 ms | refused | failed |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    with process(service(arguments.port), arguments.port, "/readyz"):
        for load in every:
            measure("the plain service", arguments.port, load, arguments.seconds)
    with cluster(arguments.port):
        for count in (1, 2):
            serve.run(replicas(Settings(), num_replicas=count, autoscaling_config=None))
            for load in every:
                measure(f"Ray Serve, {count} of 1 CPU", arguments.port, load, arguments.seconds)


if __name__ == "__main__":
    main()
