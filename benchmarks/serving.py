"""`make bench`: the service on loopback under load, beside the floors that its machine and libraries set.

Everything is measured in one run, since only ratios within a run say anything on a machine that others share.
"""

import argparse
import asyncio
import io
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple
from urllib.request import urlopen

import numpy as np
import uvloop
from PIL import Image

from app import engines
from app.__main__ import raise_descriptor_limit
from app.api.uploads import Form, FormParser
from app.engines.hardware import available_cpus
from app.inference.batcher import Batcher
from app.inference.queue import RequestQueue
from app.model import weights
from app.model.preprocessing import Limits, decode
from app.settings import Settings
from benchmarks import throughput
from benchmarks.client import Run, closed_loop, form, open_loop, post

ROOT = Path(__file__).parents[1]
LIMITS = Limits(32, 10_000_000)
TICKS = os.sysconf("SC_CLK_TCK")
CONCURRENCY = (1, 16, 64)
MANY = 64
SIZES = (1, 8, 32, 64, 128)
ROOM = ("--max-queue", "8192")  # for 64 callers with 64 images each


class Cell(NamedTuple):
    """One row of the table. `cpu_us` and `client_us`: of the service and of the load generator, an image."""

    what: str
    images: int
    load: str
    requests_per_s: float
    p50_ms: float
    p99_ms: float
    cpu_us: float
    client_us: float
    refused: int
    failed: int


class Served(NamedTuple):
    """A process under test."""

    pid: int
    port: int
    ready_s: float

    def pids(self) -> list[int]:
        """The process and its workers."""
        children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
        return [self.pid, *map(int, children)]

    def cpu_s(self) -> float:
        fields = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() for pid in self.pids()]
        return sum(int(field[11]) + int(field[12]) for field in fields) / TICKS

    def memory_mb(self, what: str = "VmRSS") -> float:
        """Resident now, or at its highest so far (VmHWM)."""
        lines = [line for pid in self.pids() for line in Path(f"/proc/{pid}/status").read_text().splitlines()]
        return sum(int(line.split()[1]) for line in lines if line.startswith(what)) / 1024

    def descriptors(self) -> int:
        return sum(len(os.listdir(f"/proc/{pid}/fd")) for pid in self.pids())


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
    return [sys.executable, "-m", "uvicorn", "benchmarks.bare_asgi:app", *options]


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
    """Drives the load twice, once to warm up."""
    uvloop.run(drive())
    before, client_before = served.cpu_s(), time.process_time()
    run: Run = uvloop.run(drive())
    cpu, client, answered = served.cpu_s() - before, time.process_time() - client_before, sum(run.statuses.values())
    assert answered, "nothing was answered"
    each, refused = 1e6 / (answered * images), answered - run.statuses[200]
    p50, p99 = run.percentile(0.5), run.percentile(0.99)
    return Cell(what, images, load, run.rate, p50, p99, cpu * each, client * each, refused, run.failures)


def per_call_us(work: Callable[[int], object], seconds: float = 0.5) -> float:
    """Microseconds of CPU a call, the best of three tries."""
    best = float("inf")
    for _ in range(3):
        work(0)
        begun, calls = time.process_time(), 0
        while time.process_time() - begun < seconds / 3:
            work(calls)
            calls += 1
        best = min(best, (time.process_time() - begun) / calls * 1e6)
    return best


async def rested_us(work: Callable[[], Awaitable[object]], times: int = 500, pause_s: float = 0.001) -> float:
    """Microseconds that an answer takes after a pause, as a lone client's comes: the median."""
    taken = []
    for _ in range(times):
        await asyncio.sleep(pause_s)
        begun = time.perf_counter()
        await work()
        taken.append(time.perf_counter() - begun)
    return median(taken) * 1e6


def parse(body: bytes, settings: Settings) -> Form:
    parser = FormParser("BOUNDARY", settings)
    parser.feed(body)
    return parser.close()


def floors(files: list[tuple[str, bytes]]) -> dict[str, Any]:
    """What the parts cost alone, in process: parsing, decoding, the network at each batch size."""
    bodies = [form([file]).partition(b"\r\n\r\n")[2] for file in files]
    settings = Settings()
    run = engines.load(weights.load(settings.weights), "cpu")
    one = np.zeros((1, LIMITS.size, LIMITS.size, 3), np.uint8)
    idle: Batcher[int, int] = Batcher(lambda items, exclusive: items, [1], RequestQueue(1))
    idle.start()

    async def network() -> None:
        run(one)

    async def hand_over() -> None:
        with idle.queue.reserve(1) as reservation:
            await idle.submit([0], reservation)

    return {
        "parse_us": per_call_us(lambda i: parse(bodies[i % len(bodies)], settings)),
        "decode_us": per_call_us(lambda i: decode(files[i % len(files)][1], LIMITS)),
        "rested_us": uvloop.run(rested_us(network)),
        "hand_over_us": uvloop.run(rested_us(hand_over)),
        "engine": run.name,
        "precision": run.precision,
        "model": throughput.measure(run, LIMITS.size, SIZES),
        "model_together": together(run),
    }


def together(run: engines.Engine) -> dict[int, float]:
    """Images/s of as many calls at once as the engine has streams, for each batch size."""
    with ThreadPoolExecutor(run.streams) as pool:
        measure_one = partial(throughput.measure, partial(run, exclusive=run.streams == 1), LIMITS.size, SIZES)
        rates = [lane.result() for lane in [pool.submit(measure_one) for _ in range(run.streams)]]
    return {size: sum(rate[size] for rate in rates) for size in SIZES}


class Floor:
    """The least that a request can cost on this machine, from the parts measured alone and a bare uvicorn's cells."""

    def __init__(self, parts: dict[str, Any], bare: list[Cell]) -> None:
        self.parts = parts
        self.bare = {(cell.images, cell.load): cell for cell in bare}
        self.fastest = max(*parts["model"].values(), *parts["model_together"].values())
        self.cpus = available_cpus()

    def p50_ms(self, load: str) -> float:
        """A bare answer, parsing, decoding and the network at batch 1, one after the other."""
        alone = 1e3 / self.parts["model"][1]
        return self.bare[1, load].p50_ms + (self.parts["parse_us"] + self.parts["decode_us"]) / 1e3 + alone

    def requests_per_s(self, images: int) -> float:
        """All CPUs busy without a pause: with the load generator, bare HTTP, parsing, decoding and the network."""
        bare = self.bare[images, "closed, 64" if images == 1 else "closed, 16"]
        model_us = self.cpus / self.fastest * 1e6
        each = bare.cpu_us + bare.client_us + self.parts["parse_us"] + self.parts["decode_us"] + model_us
        return self.cpus * 1e6 / (each * images)

    def ratio(self, cell: Cell) -> str:
        """What the cell reaches of its floor: time over least time at concurrency 1, else rate over highest rate."""
        if cell in self.bare.values():
            return ""
        if cell.load == "closed, 1" and cell.images == 1:
            return f"{cell.p50_ms / self.p50_ms(cell.load):.2f} x {self.p50_ms(cell.load):.2f} ms"
        if cell.load.startswith("closed") and cell.load != "closed, 1":
            highest = self.requests_per_s(cell.images) * cell.images
            return f"{cell.requests_per_s * cell.images / highest:.2f} x {highest:.0f} images/s"
        return ""

    def split(self, cell: Cell) -> tuple[float, ...]:
        """Microseconds of CPU an image: parsing, decoding, the network alone on all CPUs, and the rest."""
        size = 1 if cell.load == "closed, 1" and cell.images == 1 else MANY
        known = self.parts["parse_us"], self.parts["decode_us"], self.cpus / self.parts["model"][size] * 1e6
        return (*known, cell.cpu_us - sum(known))


def bench(files: list[tuple[str, bytes]], seconds: float, port: int, soak: int) -> dict[str, Any]:
    ones = [form([file]) for file in files]
    raws = [post(data, "application/octet-stream") for _, data in files]
    manies = [form(files[i : i + MANY]) for i in range(0, len(files), MANY)]
    parts = floors(files)
    bare, cells = [], []

    def closed(requests: list[bytes], concurrency: int) -> Callable[[], Any]:
        return lambda: closed_loop(port, requests, concurrency, seconds, warm_up_s=0.5)

    with process(hello(port), port, "/") as served:
        for concurrency in CONCURRENCY:
            load = f"closed, {concurrency}"
            bare.append(measure(served, "bare uvicorn", load, 1, closed(ones, concurrency)))
        bare.append(measure(served, "bare uvicorn", "closed, 16", MANY, closed(manies, 16)))
    floor = Floor(parts, bare)
    print(HEAD, *(line(cell, floor) for cell in bare), sep="\n", flush=True)

    def add(*row: Any) -> None:
        cells.append(measure(served, *row))
        print(line(cells[-1], floor), flush=True)

    with process(service(port, *ROOM), port, "/readyz") as served:
        report = {"ready_s": served.ready_s, "memory_mb": [served.memory_mb()]}
        for what, requests, images in (("form", ones, 1), ("raw", raws, 1), ("form", manies, MANY)):
            for concurrency in CONCURRENCY:
                add(what, f"closed, {concurrency}", images, closed(requests, concurrency))
        report["memory_mb"].append(served.memory_mb())
        report["soak"] = list(soaked(served, manies, soak)) if soak else []
    with process(service(port), port, "/readyz") as served:
        peak = max(cell.requests_per_s for cell in cells if cell.what == "form" and cell.images == 1)
        for share in (0.25, 0.5, 0.75, 2.0):
            drive = lambda rate=share * peak: open_loop(port, ones, rate, seconds)  # noqa: E731
            add("form", f"open, {share:g} of peak", 1, drive)
    with process(service(port, *ROOM, "--workers", "2"), port, "/readyz") as served:
        add("2 workers", "closed, 64", 1, closed(ones, 64))
        add("2 workers", "closed, 16", MANY, closed(manies, 16))
    return report | {
        "floors": parts,
        "bare": [cell._asdict() for cell in bare],
        "cells": [
            cell._asdict() | {"of_floor": floor.ratio(cell), "cpu_us_split": floor.split(cell)} for cell in cells
        ],
    }


def soaked(served: Served, manies: list[bytes], pictures: int, steps: int = 10) -> Iterator[tuple[int, float]]:
    """Memory in MB after each tenth of so many pictures."""
    done = 0
    for step in range(1, steps + 1):
        while done < pictures * step / steps:
            run: Run = uvloop.run(closed_loop(served.port, manies, 16, 2.0, warm_up_s=0))
            done += run.statuses[200] * MANY
        yield done, served.memory_mb()


HEAD = (
    "| request | load | requests/s | images/s | p50 ms | p99 ms | CPU us an image: service | client | refused | failed "
    "| of the floor |\n| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"
)


def line(cell: Cell, floor: Floor) -> str:
    return (
        f"| {cell.what}, {cell.images} | {cell.load} | {cell.requests_per_s:.0f} | "
        f"{cell.requests_per_s * cell.images:.0f} | {cell.p50_ms:.2f} | {cell.p99_ms:.2f} | {cell.cpu_us:.0f} | "
        f"{cell.client_us:.0f} | {cell.refused} | {cell.failed} | {floor.ratio(cell)} |"
    )


def details(report: dict[str, Any]) -> str:
    """Where the CPU's time goes, what the network does alone, how memory stands."""
    rows = ["| CPU us an image | parse | decode | network alone | rest |", "| --- | ---: | ---: | ---: | ---: |"]
    for cell in report["cells"]:
        if cell["load"].startswith("closed") and cell["what"] != "2 workers":
            parts = " | ".join(f"{part:.0f}" for part in cell["cpu_us_split"])
            rows.append(f"| {cell['what']}, {cell['images']}; {cell['load']} | {parts} |")
    floors = report["floors"]
    engine_name = f"{floors['engine']} in {floors['precision']}"
    rows += ["", f"| {engine_name}, batch | images/s | in calls side by side |", "| ---: | ---: | ---: |"]
    rows += [
        f"| {size} | {rate:.0f} | {floors['model_together'][size]:.0f} |" for size, rate in floors["model"].items()
    ]
    alone = 1e6 / floors["model"][1]
    rows += [
        "",
        f"A lone picture after a pause: {floors['rested_us']:.0f} us in the network ({alone:.0f} us without pauses), "
        f"{floors['hand_over_us']:.0f} us from the event loop to the inference thread and back.",
    ]
    memory = " to ".join(f"{mb:.0f}" for mb in report["memory_mb"])
    rows += ["", f"ready after {report['ready_s']:.2f} s; {memory} MB resident"]
    if report["soak"]:
        rows += ["", "| pictures | MB |", "| ---: | ---: |"]
        rows += [f"| {count:,} | {mb:.0f} |" for count, mb in report["soak"]]
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, help="CIFAR-10 folder to take pictures from [the examples]")
    parser.add_argument("--seconds", type=float, default=4.0, help="of each measurement, after as long a warm-up [4]")
    parser.add_argument("--soak", type=int, default=0, metavar="PICTURES", help="watch the memory over so many [0]")
    parser.add_argument("--port", type=int, default=18099)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "bench.json")
    arguments = parser.parse_args()
    raise_descriptor_limit()  # the open loop opens as many connections as it needs
    report = bench(pictures(arguments.data), arguments.seconds, arguments.port, arguments.soak)
    report |= {
        "machine": platform.processor() or platform.machine(),
        "cpus": available_cpus(),
        "time": time.strftime("%F"),
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(report, indent=1))
    print("", details(report), f"JSON in {arguments.out}", sep="\n")


if __name__ == "__main__":
    main()
