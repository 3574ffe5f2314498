"""What made a weights file, for its card: the commit of this code and the machine."""

import subprocess
from pathlib import Path
from typing import Any

import torch

from app.engines import Engine
from app.engines.hardware import available_cpus, cpu_model


def commit() -> str | None:
    """The checkout's commit, with `-dirty` for changed files; None outside a checkout, as in an installed package."""
    folder = Path(__file__).parent
    git = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        if not (folder.parent / ".git").exists():
            return None
        return subprocess.run(git, capture_output=True, text=True, timeout=10, check=True).stdout.strip()  # noqa: S603
    except (OSError, subprocess.SubprocessError):
        return None


def engine(engine: Engine) -> str:
    """What calibration and accuracies were measured on, such as `openvino on cpu in int8`."""
    return f"{engine.name} on {engine.device} in {engine.precision}"


def step(seconds: float, device: torch.device) -> dict[str, Any]:
    """Of one step of a training, for the results on a card."""
    return {"training_s": round(seconds), "commit": commit(), "machine": machine(device)}


def machine(device: torch.device, cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The GPU's name, or the CPU's and how many of them this process may use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{cpu_model(cpuinfo)}, {available_cpus()} CPUs, torch {torch.__version__}"
