"""What this machine offers: CPUs of this process, their instructions, a GPU; and the choices that follow from it."""

import os
import sys
import threading
from importlib.util import find_spec
from pathlib import Path

from app.engines.cgroup import cpu_quota

NICE = 10  # below the event loop, which starved with 3 (docs/experiments/2026-11-24-two-streams.md)


def available_cpus(system: Path = Path("/")) -> int:
    """CPUs in this process's affinity mask, or of its control groups' quota where that is less; at least 1."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cpu_quota(system)
    return cpus if quota is None else max(1, min(cpus, int(quota)))


def cpu_flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> frozenset[str]:
    """Instruction set extensions of the first CPU as Linux reports them; empty on other systems."""
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        return frozenset()
    return next((frozenset(line.split()) for line in lines if line.startswith("flags")), frozenset())


def pick_precision(flags: frozenset[str]) -> str:
    """The fastest of int8, bfloat16 and float32 that these CPU flags support natively.

    Without dot-product instructions int8 is not faster, and its 16-bit intermediates can overflow.
    """
    if flags & {"avx512_vnni", "avx_vnni", "amx_int8"}:
        return "int8"
    return "bfloat16" if flags & {"avx512_bf16", "amx_bf16"} else "float32"


def resolve_device(name: str) -> str:
    """`auto` is cuda where torch can use a GPU, else cpu; other names are returned unchanged."""
    if name != "auto":
        return name
    return "cuda" if _driver_has_gpu() and _torch_has_cuda() else "cpu"


def _driver_has_gpu() -> bool:
    """Queries the CUDA driver: the same query through torch would cost its import on every machine without a GPU."""
    from ctypes import CDLL, byref, c_int

    try:
        driver, count = CDLL("libcuda.so.1"), c_int()
        return driver.cuInit(0) == 0 and driver.cuDeviceGetCount(byref(count)) == 0 and count.value > 0
    except (OSError, AttributeError):
        return False


def _torch_has_cuda() -> bool:
    if find_spec("torch") is None:
        return False
    import torch

    return torch.cuda.is_available()


def lower_priority() -> None:
    """Lowers this thread, and those that it starts later, to NICE below the main thread.

    On Linux only, where threads have priorities of their own. A thread can never raise its own again.
    """
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), os.getpriority(os.PRIO_PROCESS, os.getpid()) + NICE)
