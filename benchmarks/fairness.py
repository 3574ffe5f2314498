"""`python -m benchmarks.fairness`: a caller of single images beside callers of large requests.

Each caller has an API key of its own. The large ones send their next request as soon as the last is answered, or after
a 429. The single images are sent one at a time, with pauses. Exits with 1 if a single image is refused, or if the
median of their latencies is over the limit. Load generator and service share the cores.
"""

import argparse
import asyncio
import os
import platform
import sys
import time
from itertools import cycle

import uvloop

from benchmarks.client import connect, exchange
from benchmarks.load import LoadResult
from benchmarks.payloads import form, image_files
from benchmarks.server_process import running, service

MAX_P50_MS = 150.0
PAUSE_S = 0.1  # between single images, and after a 429 of a large caller


def with_key(request: bytes, key: str) -> bytes:
    line, rest = request.split(b"\r\n", 1)
    return b"\r\n".join([line, f"X-API-Key: {key}".encode(), rest])


async def caller(port: int, requests: list[bytes], end: float, pause_s: float) -> LoadResult:
    """One connection; sends a request after the response to the last one, and `pause_s` later except after a 200."""
    result, connection, source, start = LoadResult(), await connect(port), cycle(requests), time.perf_counter()
    while (sent := time.perf_counter()) < end:
        connection, status = await exchange(port, connection, next(source))
        result.add(connection, status, time.perf_counter() - sent)
        if pause_s and (status != 200 or len(requests) > 1):
            await asyncio.sleep(pause_s)
    result.seconds = time.perf_counter() - start
    connection.close()
    return result


async def measure(port: int, callers: int, images: int, seconds: float) -> tuple[LoadResult, list[LoadResult]]:
    """The results of the caller of single images, and of the others."""
    files = image_files(None)
    single = [with_key(form([file]), "single") for file in files]
    large = [with_key(form((files * images)[:images]), f"large-{index}") for index in range(callers)]
    end = time.perf_counter() + seconds
    lone, *others = await asyncio.gather(
        caller(port, single, end, PAUSE_S), *(caller(port, [request], end, PAUSE_S) for request in large)
    )
    return lone, others


def row(name: str, result: LoadResult) -> str:
    statuses = result.statuses
    other = statuses.total() - statuses[200] - statuses[429] + result.failures
    p50, p99 = result.percentile_ms(0.5), result.percentile_ms(0.99)
    return f"| {name} | {statuses[200]} | {statuses[429]} | {other} | {p50:.0f} | {p99:.0f} |"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fairness", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--callers", type=int, default=4, help="of large requests [4]")
    parser.add_argument("--images", type=int, default=256, help="of a large request [256]")
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--port", type=int, default=18093)
    parser.add_argument("flags", nargs="*", help="of the service, after --, such as -- --max-queue-share 1")
    arguments = parser.parse_args()
    keys = ",".join(["single", *(f"large-{index}" for index in range(arguments.callers))])
    flags = ["--api-keys", keys, *arguments.flags]
    with running(service(arguments.port, *flags), arguments.port) as server:
        lone, others = uvloop.run(measure(server.port, arguments.callers, arguments.images, arguments.seconds))
    images = sum(result.statuses[200] for result in others) * arguments.images + lone.statuses[200]
    print(f"{os.cpu_count()} CPUs, {platform.machine()}, {images / lone.seconds:.0f} images/s in all\n")
    print("| caller | 200 | 429 | other | p50 ms | p99 ms |\n| --- | ---: | ---: | ---: | ---: | ---: |")
    print(row("single images", lone), *(row(f"{arguments.images} images", each) for each in others), sep="\n")
    is_served = lone.statuses.total() == lone.statuses[200] and not lone.failures
    return 0 if is_served and lone.percentile_ms(0.5) <= MAX_P50_MS else 1


if __name__ == "__main__":
    sys.exit(main())
