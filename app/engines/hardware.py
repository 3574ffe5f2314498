"""What the processor offers: how many CPUs this process may use, and which fast arithmetic they have."""

import os
import sys
import threading
from pathlib import Path

NICE = 10  # below the event loop, which starved with 3 (docs/benchmarks.md)


def available_cpus(cgroup: Path = Path("/sys/fs/cgroup/cpu.max")) -> int:
    """CPUs in this process's affinity mask, or of the cgroup's quota where that is less; at least 1."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = cgroup.read_text().split()
    except (OSError, ValueError):
        return cpus
    return cpus if quota == "max" else max(1, min(cpus, int(quota) // int(period)))


def features(cpuinfo: Path = Path("/proc/cpuinfo")) -> frozenset[str]:
    """The flags that Linux reports for the first CPU; empty where there is no such report."""
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        return frozenset()
    return next((frozenset(line.split()) for line in lines if line.startswith("flags")), frozenset())


def pick_precision(flags: frozenset[str]) -> str:
    """int8 where the processor has dot products for it, else bfloat16 likewise, else float32.

    Without such instructions int8 is neither faster nor safe from overflow in its 16-bit intermediates.
    """
    if flags & {"avx512_vnni", "avx_vnni", "amx_int8"}:
        return "int8"
    return "bfloat16" if flags & {"avx512_bf16", "amx_bf16"} else "float32"


def lower_priority() -> None:
    """Of this thread and of those that it starts, where the system lets the threads of a process differ."""
    if sys.platform == "linux":
        thread = threading.get_native_id()
        os.setpriority(os.PRIO_PROCESS, thread, os.getpriority(os.PRIO_PROCESS, thread) + NICE)
