"""`python -m benchmarks.shadow`: what a shadow costs at full load.

Two services with the bundled weights, one with the same file as its shadow, get a closed loop in turns, so that a
drift of the machine's speed meets both. Exits with 1 if the median rate with the shadow is under 0.95 of that without.
Load generator and service share the cores.
"""

import argparse
import json
import os
import platform
import sys
from statistics import median
from typing import Any
from urllib.request import urlopen

import uvloop

from app.model import weights
from benchmarks.load import LoadResult, closed_loop
from benchmarks.payloads import forms, image_files
from benchmarks.server_process import ServerProcess, running, service

MIN_RATIO = 0.95


def measure(server: ServerProcess, clients: int, images: int, seconds: float) -> LoadResult:
    requests = forms(image_files(None), images)
    return uvloop.run(closed_loop(server.port, requests, clients, seconds, warm_up_s=2.0))


def shadow_card(port: int) -> dict[str, Any]:
    with urlopen(f"http://127.0.0.1:{port}/model", timeout=30) as response:
        card: dict[str, Any] = json.load(response)["shadow"]
        return card


def row(name: str, results: list[LoadResult], images: int) -> str:
    rates = [result.rate * images for result in results]
    p50, p99 = (median(result.percentile_ms(share) for result in results) for share in (0.5, 0.99))
    failed = sum(result.failures + result.statuses.total() - result.statuses[200] for result in results)
    return f"| {name} | {median(rates):.0f} | {min(rates):.0f} to {max(rates):.0f} | {p50:.1f} | {p99:.1f} | {failed} |"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.shadow", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=8.0, help="of each turn [8]")
    parser.add_argument("--turns", type=int, default=5, help="of each service [5]")
    parser.add_argument("--clients", type=int, default=64, help="connections [64]")
    parser.add_argument("--images", type=int, default=1, help="per request [1]")
    parser.add_argument("--sample", type=float, default=1.0, help="SHADOW_SAMPLE [1]")
    parser.add_argument("--port", type=int, default=18094, help="and the next one")
    arguments = parser.parse_args()
    load = arguments.clients, arguments.images, arguments.seconds
    ports = arguments.port, arguments.port + 1
    flags = ["--max-queue-share", "1"]  # all load is from one address
    shadow_flags = [*flags, "--shadow-weights", str(weights.BUNDLED), "--shadow-sample", str(arguments.sample)]
    plain_results, shadow_results = [], []
    with (
        running(service(ports[0], *flags), ports[0]) as plain,
        running(service(ports[1], *shadow_flags), ports[1]) as shadowed,
    ):
        for _ in range(arguments.turns):
            plain_results.append(measure(plain, *load))
            shadow_results.append(measure(shadowed, *load))
        card, memory = shadow_card(ports[1]), (plain.memory_mb(), shadowed.memory_mb())
    ratio = median(each.rate for each in shadow_results) / median(each.rate for each in plain_results)
    print(f"{os.cpu_count()} CPUs, {platform.machine()}, {arguments.clients} clients, {arguments.images} images each\n")
    print("| service | images/s | range | p50 ms | p99 ms | not 200 |\n| --- | ---: | --- | ---: | ---: | ---: |")
    print(row("without shadow", plain_results, arguments.images))
    print(row("with shadow", shadow_results, arguments.images))
    print(f"\nRatio {ratio:.3f}. The shadow ran {card['images']} images, {card['ms_per_image']} ms each, and agreed on")
    print(f"{card['agreement']} of them. Memory {memory[0]:.0f} and {memory[1]:.0f} MB.")
    return 0 if ratio >= MIN_RATIO else 1


if __name__ == "__main__":
    sys.exit(main())
