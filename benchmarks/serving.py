"""`make bench`: the service on loopback under load, beside the floors that its machine and libraries set.

Everything is measured in one run, since only ratios within a run say anything on a machine that others share.
"""

import argparse
import io
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from urllib.request import urlopen

import numpy as np
import uvloop
from PIL import Image

from app.model import engine, weights
from app.model.images import Limits, decode
from app.settings import Settings
from app.uploads import parse_form
from benchmarks.load import Run, closed_loop, form, open_loop, post

ROOT = Path(__file__).parents[1]
LIMITS = Limits(32, 10_000_000)
TICKS = os.sysconf("SC_CLK_TCK")
CONCURRENCY = (1, 16, 64)
MANY = 64


class Cell(NamedTuple):
    """One row of the table."""

    what: str
    load: str
    requests_per_s: float
    images_per_s: float
    p50_ms: float
    p99_ms: float
    cpu_ms_per_image: float
    refused: int
    failed: int


class Served(NamedTuple):
    """A process under test."""

    pid: int
    port: int
    ready_s: float

    def cpu_s(self) -> float:
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICKS

    def memory_mb(self, what: str = "VmRSS") -> float:
        """Resident now, or at its highest so far (VmHWM)."""
        lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith(what)).split()[1]) / 1024

    def descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.pid}/fd"))


@contextmanager
def process(command: list[str], port: int, path: str) -> Iterator[Served]:
    """Starts a server and waits until `path` answers 200; ends it by SIGTERM."""
    begun = time.perf_counter()
    running = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
    try:
        while not _answers(port, path):
            if running.poll() is not None or time.perf_counter() - begun > 60:
                raise RuntimeError(f"{' '.join(command)} did not start")
            time.sleep(0.01)
        yield Served(running.pid, port, time.perf_counter() - begun)
    finally:
        running.send_signal(signal.SIGTERM)
        running.wait(30)


def _answers(port: int, path: str) -> bool:
    try:
        with urlopen(f"http://127.0.0.1:{port}{path}", timeout=1) as response:
            return bool(response.status == 200)
    except OSError:
        return False


def service(port: int, *flags: str) -> list[str]:
    return [sys.executable, "-m", "app", "--port", str(port), *flags]


def hello(port: int) -> list[str]:
    options = ["--port", str(port), "--no-access-log", "--log-level", "warning", "--http", "httptools"]
    return [sys.executable, "-m", "uvicorn", "benchmarks.hello:app", *options]


def pictures(data: Path | None, count: int = 256) -> list[tuple[str, bytes]]:
    """Real test pictures as files, three PNG for each JPEG: from a CIFAR-10 folder, or the examples over and over."""
    if data:
        from training import data as folders

        images = [Image.fromarray(pixels.numpy()) for pixels in folders.load(data, 32).test.images[:count]]
    else:
        images = [Image.open(path) for path in sorted((ROOT / "examples").glob("*.png")) if path.stem != "chelsea"]
        images = (images * count)[:count]
    return [_file(i, image) for i, image in enumerate(images)]


def _file(number: int, image: Image.Image) -> tuple[str, bytes]:
    kind, options = ("jpeg", {"quality": 90}) if number % 4 == 3 else ("png", {})
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return f"{number}.{kind}", buffer.getvalue()


def measure(served: Served, what: str, load: str, images: int, drive: Callable[[], Any]) -> Cell:
    """Drives the load twice, once to warm up; CPU is the server's."""
    run: Run = uvloop.run(drive())
    before, all_before = served.cpu_s(), sum(run.statuses.values())
    run = uvloop.run(drive())
    cpu, answered = served.cpu_s() - before, sum(run.statuses.values())
    assert all_before or answered, "nothing was answered"
    refused = answered - run.statuses[200]
    each = 1e3 * cpu / (answered * images)
    p50, p99 = run.percentile(0.5), run.percentile(0.99)
    return Cell(what, load, run.rate, run.rate * images, p50, p99, each, refused, run.failures)


def per_call_us(work: Callable[[int], object], seconds: float = 0.5) -> float:
    """Microseconds of CPU a call."""
    work(0)
    begun, calls = time.process_time(), 0
    while time.process_time() - begun < seconds:
        work(calls)
        calls += 1
    return (time.process_time() - begun) / calls * 1e6


def floors(files: list[tuple[str, bytes]]) -> dict[str, Any]:
    """What the parts cost alone, in process: parsing, decoding, the network at each batch size."""
    bodies = [form([file]).partition(b"\r\n\r\n")[2] for file in files]
    settings = Settings()
    run = engine.load(weights.load(settings.weights), "cpu")
    found: dict[str, Any] = {
        "parse_us": per_call_us(lambda i: parse_form(bodies[i % len(bodies)], b"BOUNDARY", settings)),
        "decode_us": per_call_us(lambda i: decode(files[i % len(files)][1], LIMITS)),
        "engine": run.name,
        "precision": run.precision,
        "model": {},
    }
    pixels = np.stack([decode(data, LIMITS).pixels for _, data in files])
    for size in (1, 8, 32, 64, 128):
        batch = pixels[:size]
        best, cpu_us = 0.0, 0.0
        for _ in range(3):
            begun, cpu, calls = time.perf_counter(), time.process_time(), 0
            while time.perf_counter() - begun < 0.5:
                run(batch)
                calls += 1
            rate = calls * size / (time.perf_counter() - begun)
            if rate > best:
                best, cpu_us = rate, (time.process_time() - cpu) / (calls * size) * 1e6
        found["model"][size] = {"images_per_s": best, "cpu_us_per_image": cpu_us}
    return found


def bench(files: list[tuple[str, bytes]], seconds: float, port: int) -> dict[str, Any]:
    ones = [form([file]) for file in files]
    raws = [post(data, "application/octet-stream") for _, data in files]
    manies = [form(files[i : i + MANY]) for i in range(0, len(files), MANY)]
    cells: list[Cell] = []
    report: dict[str, Any] = {"floors": floors(files)}

    def closed(requests: list[bytes], concurrency: int) -> Callable[[], Any]:
        return lambda: closed_loop(port, requests, concurrency, seconds, warm_up_s=0.5)

    with process(hello(port), port, "/") as served:
        for concurrency in CONCURRENCY:
            load = f"closed, {concurrency}"
            cells.append(measure(served, "bare uvicorn, 1 image", load, 1, closed(ones, concurrency)))
        cells.append(measure(served, f"bare uvicorn, {MANY} images", "closed, 16", MANY, closed(manies, 16)))
    with process(service(port), port, "/readyz") as served:
        report |= {"ready_s": served.ready_s, "memory_mb_at_start": served.memory_mb()}
        for what, requests, images in (
            ("1 image", ones, 1),
            ("1 raw image", raws, 1),
            (f"{MANY} images", manies, MANY),
        ):
            for concurrency in CONCURRENCY:
                load = f"closed, {concurrency}"
                cells.append(measure(served, what, load, images, closed(requests, concurrency)))
                print(line(cells[-1]), flush=True)
        peak = max(cell.requests_per_s for cell in cells if cell.what == "1 image")
        for share in (0.25, 0.5, 0.75, 2.0):
            rate = share * peak
            load = f"open, {share:g} of peak"
            drive = lambda rate=rate: open_loop(port, ones, rate, seconds)  # noqa: E731
            cells.append(measure(served, "1 image", load, 1, drive))
            print(line(cells[-1]), flush=True)
        report["memory_mb_at_end"] = served.memory_mb()
    return report | {"cells": [cell._asdict() for cell in cells]}


HEAD = (
    "| request | load | requests/s | images/s | p50 ms | p99 ms | CPU ms an image | refused | failed |\n"
    "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"
)


def line(cell: Cell) -> str:
    return (
        f"| {cell.what} | {cell.load} | {cell.requests_per_s:.0f} | {cell.images_per_s:.0f} | {cell.p50_ms:.2f} | "
        f"{cell.p99_ms:.2f} | {cell.cpu_ms_per_image:.3f} | {cell.refused} | {cell.failed} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, help="CIFAR-10 folder to take pictures from [the examples]")
    parser.add_argument("--seconds", type=float, default=4.0, help="of each measurement, after as long a warm-up [4]")
    parser.add_argument("--port", type=int, default=18099)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "bench.json")
    arguments = parser.parse_args()
    report = bench(pictures(arguments.data), arguments.seconds, arguments.port)
    report |= {
        "machine": platform.processor() or platform.machine(),
        "cpus": os.cpu_count(),
        "time": time.strftime("%F"),
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(report, indent=1))
    print(HEAD, *(line(Cell(**cell)) for cell in report["cells"]), sep="\n")
    print(f"\nready after {report['ready_s']:.2f} s; JSON in {arguments.out}")


if __name__ == "__main__":
    main()
