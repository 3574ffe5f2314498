"""One and two replicas on Ray Serve beside the plain service, in one run. Needs the extra `ray`.

python -m benchmarks.ray_replicas
"""

import argparse
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import uvloop

from app.settings import Settings
from benchmarks.load import closed_loop
from benchmarks.payloads import IMAGES_PER_BULK_REQUEST, File, forms, image_files
from benchmarks.server_process import ROOT, running, service

LOADS = ((1, 1), (1, 16), (1, 64), (IMAGES_PER_BULK_REQUEST, 16))  # images per request, connections
ENVIRONMENT = {
    "RAY_AUTH_MODE": "disabled",  # else Ray leaves a token in the home folder
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # keeps every port on loopback
    "RAY_USAGE_STATS_ENABLED": "0",
    "PYTHONPATH": str(ROOT),
}
HEAD = (
    "| server | images per request | connections | requests/s | images/s | p50 ms | p99 ms | rejected | failed |\n"
    "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"
)


@contextmanager
def cluster(port: int) -> Iterator[None]:
    import ray  # reads ENVIRONMENT when it is imported
    from ray import serve

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, _node_ip_address="127.0.0.1")
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    try:
        yield
    finally:
        serve.shutdown()
        ray.shutdown()


def start_replicas(count: int) -> None:
    from ray import serve

    from deploy.ray_serve import replicas

    serve.run(replicas(Settings(), num_replicas=count, autoscaling_config=None))


class Run:
    """Measures every load on one address; `seconds` of each, after as long a warm-up."""

    def __init__(self, files: list[File], port: int, seconds: float) -> None:
        self._requests = {1: forms(files), IMAGES_PER_BULK_REQUEST: forms(files, IMAGES_PER_BULK_REQUEST)}
        self._port = port
        self._seconds = seconds

    def print_rows(self, server: str) -> None:
        for images, connections in LOADS:
            print(self._row(server, images, connections), flush=True)

    def _row(self, server: str, images: int, connections: int) -> str:
        loop = closed_loop(self._port, self._requests[images], connections, self._seconds, warm_up_s=self._seconds)
        result = uvloop.run(loop)
        return (
            f"| {server} | {images} | {connections} | {result.rate:.0f} | {result.rate * images:.0f} | "
            f"{result.percentile_ms(0.5):.1f} | {result.percentile_ms(0.99):.1f} | "
            f"{result.statuses.total() - result.statuses[200]} | {result.failures} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.ray_replicas", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--data", type=Path, help="CIFAR-10 folder with the images [the examples]")
    parser.add_argument("--seconds", type=float, default=4.0, help="of each measurement, after as long a warm-up [4]")
    parser.add_argument("--port", type=int, default=18099)
    arguments = parser.parse_args()
    os.environ |= ENVIRONMENT
    run = Run(image_files(arguments.data), arguments.port, arguments.seconds)
    print(HEAD)
    with running(service(arguments.port), arguments.port):
        run.print_rows("plain service")
    with cluster(arguments.port):
        for count in (1, 2):
            start_replicas(count)
            run.print_rows(f"Ray Serve, {count} replica{'s' * (count > 1)} of 1 CPU")


if __name__ == "__main__":
    main()
