"""Checks a GPU and what the project does on it. Findings are JSON lines, and at the end a table.

    python -m benchmarks.gpu --out runs/gpu [--data folder-of-cifar-10] [--parts serve]
    python -m benchmarks.gpu --device cpu --quick --out runs/gpu        a dry run on any machine

Each part runs in a process and under a limit of its own. A part that hangs or fails does not affect the others.
"""

import argparse
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from threading import Timer
from typing import Any, NamedTuple

from benchmarks.gpu.findings import Options
from benchmarks.gpu.table import write_table
from benchmarks.server_process import ROOT

LEAST_S = 12.0  # a part with less time left is skipped
QUICK_S = 240.0  # limit of every part with --quick


class Part(NamedTuple):
    """The function is imported in the part's own process. `limit_s` holds on a GPU."""

    module: str
    function: str
    limit_s: float


PARTS = {
    "versions": Part("engine", "versions", 40),
    "references": Part("engine", "references", 60),
    "rates": Part("engine", "rates", 110),
    "serving": Part("service", "serving", 150),
    "faults": Part("service", "faults", 100),
    "short": Part("training", "short", 90),
    "steps": Part("training", "steps", 150),
    "full": Part("training", "full", 300),
}
SETS = {
    "serve": ["versions", "references", "rates", "serving", "faults"],
    "train": ["short", "steps", "full"],
    "serve+train": [*PARTS],
}


def run_part(name: str, arguments: argparse.Namespace, left_s: float) -> Iterator[dict[str, Any]]:
    """The part's findings, and at last how it ended. Everything that it started is killed with it."""
    limit_s = min(QUICK_S if arguments.quick else PARTS[name].limit_s, left_s)
    command = [sys.executable, "-m", "benchmarks.gpu", "--part", name, "--limit", str(limit_s)]
    command += ["--device", arguments.device, "--out", str(arguments.out), *["--quick"] * arguments.quick]
    command += ["--data", str(arguments.data)] if arguments.data else []
    start = time.monotonic()
    with (arguments.out / "errors.log").open("ab") as errors:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True
        )
        timer = Timer(limit_s, os.killpg, (process.pid, signal.SIGKILL))
        timer.start()
        assert process.stdout is not None
        for line in process.stdout:
            yield _parsed(line)
        status = process.wait()
        timer.cancel()
        with process.stdout:
            _kill_group(process.pid)
    ended = {0: "ok", -signal.SIGKILL: f"cut off after {limit_s:g} s"}.get(status, f"exit code {status}")
    yield {"what": "part", "ended": ended, "seconds": round(time.monotonic() - start, 1)}


def _parsed(line: str) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except ValueError:
        found = None
    return found if isinstance(found, dict) else {"what": "text", "text": line.rstrip()[:500]}


def _kill_group(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


def run_all(arguments: argparse.Namespace, parts: list[str]) -> list[dict[str, Any]]:
    start, found = time.monotonic(), []
    with (arguments.out / "results.jsonl").open("a") as results:
        for name in parts:
            left_s = arguments.budget - (time.monotonic() - start)
            skipped = iter([{"what": "part", "ended": "skipped: no time left"}])
            for each in run_part(name, arguments, left_s) if left_s > LEAST_S else skipped:
                found.append({"part": name, "t": round(time.monotonic() - start, 1), **each})
                line = json.dumps(found[-1])
                print(line[:700], flush=True)
                print(line, file=results, flush=True)
    return found


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--parts", default="serve+train", help=f"{', '.join(SETS)}, or names of {', '.join(PARTS)} with commas")
    add("--device", default="cuda", help="cuda, cuda:N or cpu [%(default)s]")
    add("--budget", type=float, default=900.0, help="seconds for all parts together [%(default)s]")
    add("--out", type=Path, default=Path(os.environ.get("OUT", "runs/gpu")), help="folder of the results [%(default)s]")
    add("--data", type=Path, help="data folder such as CIFAR-10's; without it images are noise")
    add("--quick", action="store_true", help="small sizes and short times")
    add("--part", help=argparse.SUPPRESS)
    add("--limit", type=float, default=600.0, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    parts = SETS.get(arguments.parts) or arguments.parts.split(",")
    if unknown := set(parts) - PARTS.keys():
        parser.error(f"--parts: unknown {', '.join(sorted(unknown))}")
    arguments.out = arguments.out.resolve()
    arguments.parts = parts
    return arguments


def main(argv: list[str] | None = None) -> None:
    arguments = parse(argv)
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.part:
        part = PARTS[arguments.part]
        function: Callable[[Options], None] = getattr(
            importlib.import_module(f"benchmarks.gpu.{part.module}"), part.function
        )
        function(Options.of(arguments))
        return
    found = run_all(arguments, arguments.parts)
    write_table(arguments.out / "results.md", found)
    print(f"{arguments.out}/results.md and results.jsonl are written")


if __name__ == "__main__":
    main()
