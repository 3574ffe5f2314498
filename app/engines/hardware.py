"""What this machine offers: CPUs of this process, their instructions, a GPU; and the choices that follow from it."""

import logging
import os
import platform
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from app.engines import cuda
from app.engines.cgroup import cpu_quota
from app.engines.cuda import Driver, Torch

logger = logging.getLogger(__name__)

CPUINFO = Path("/proc/cpuinfo")
NICE = 10  # below the event loop, which did not get enough time with 3 (docs/experiments/2026-11-24-two-streams.md)


def available_cpus(system: Path = Path("/")) -> int:
    """CPUs in this process's affinity mask, or of its control groups' quota where that is less; at least 1."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cpu_quota(system)
    return cpus if quota is None else max(1, min(cpus, int(quota)))


def cpu_flags(cpuinfo: Path = CPUINFO) -> frozenset[str]:
    """Instruction set extensions of the first CPU as Linux reports them; empty on other systems."""
    return next((frozenset(line.split()) for line in _lines(cpuinfo) if line.startswith("flags")), frozenset())


def cpu_model(cpuinfo: Path = CPUINFO) -> str:
    """The CPU's model name on Linux, else Python's name of the platform."""
    names = (line.partition(":")[2].strip() for line in _lines(cpuinfo) if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _lines(cpuinfo: Path) -> list[str]:
    """Empty where there is no such file."""
    try:
        return cpuinfo.read_text().splitlines()
    except OSError:
        return []


def native_precisions(flags: frozenset[str]) -> list[str]:
    """Those of int8, bfloat16 and float32 that a CPU with these flags supports natively, fastest first.

    Without dot-product instructions int8 is not faster, and its 16-bit intermediates can overflow. OpenVINO simulates
    bfloat16 where the CPU does not have it, which its documentation calls slower than float32.
    """
    int8 = flags & {"avx512_vnni", "avx_vnni", "amx_int8"}
    bfloat16 = flags & {"avx512_bf16", "amx_bf16"}
    return [*(["int8"] if int8 else []), *(["bfloat16"] if bfloat16 else []), "float32"]


def resolve_device(
    name: str,
    query_driver: Callable[[], Driver | None] = cuda.query_driver,
    query_torch: Callable[[], Torch | None] = cuda.query_torch,
) -> str:
    """`auto` is cuda where driver, GPU and torch fit together, else cpu; other names are returned unchanged.

    With an NVIDIA driver, a warning has the reason for the CPU.
    """
    if name != "auto":
        return name
    driver = query_driver()
    if driver is None:
        return "cpu"
    usable = driver.devices > 0 and not driver.error
    if reason := cuda.obstacle(driver, query_torch() if usable else None):
        logger.warning("falling back to the CPU: %s", reason)
        return "cpu"
    return "cuda"


def lower_priority() -> None:
    """Lowers this thread, and those that it starts later, to NICE below the main thread.

    On Linux only, where threads have priorities of their own. A thread can never raise its own again.
    """
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), os.getpriority(os.PRIO_PROCESS, os.getpid()) + NICE)
