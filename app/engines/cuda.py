"""Whether this machine's GPU, driver and torch fit together, and why not. Nothing here imports torch."""

from ctypes import CDLL, byref, c_int
from importlib.util import find_spec
from typing import Any, NamedTuple

CUDA_ERRORS = {3: "not initialised", 34: "a stub library", 100: "no device", 802: "not yet initialised", 999: "unknown"}


class Driver(NamedTuple):
    """What libcuda reports: the newest CUDA it supports, as (major, minor), or the error of its initialisation."""

    version: tuple[int, int] | None
    devices: int
    error: str = ""


class Torch(NamedTuple):
    """What torch reports: its version, its CUDA or "", usable GPUs, and the first one's capability.

    `architectures` are the machine codes of its kernels, such as sm_90 or compute_90.
    """

    version: str
    cuda: str
    devices: int
    name: str = ""
    capability: tuple[int, int] = (0, 0)
    architectures: tuple[str, ...] = ()


def query_driver() -> Driver | None:
    """None without an NVIDIA driver. It costs 0.1 s, torch's import two seconds on every machine without a GPU."""
    version, count = c_int(), c_int()
    try:
        library = CDLL("libcuda.so.1")
        error = library.cuInit(0)
        if not error:
            error = library.cuDeviceGetCount(byref(count)) or library.cuDriverGetVersion(byref(version))
    except (OSError, AttributeError):
        return None
    if error:
        return Driver(None, 0, f"{CUDA_ERRORS.get(error, 'error')} ({error})")
    return Driver((version.value // 1000, version.value % 1000 // 10), count.value)


def query_torch(index: int = 0) -> Torch | None:
    """None where torch is not installed; `index` is the number of the GPU."""
    if find_spec("torch") is None:
        return None
    import torch

    devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    found = Torch(torch.__version__, torch.version.cuda or "", devices)
    if index >= devices:
        return found
    properties: Any = torch.cuda.get_device_properties(index)
    capability = (properties.major, properties.minor)
    return found._replace(name=properties.name, capability=capability, architectures=tuple(torch.cuda.get_arch_list()))


def obstacle(driver: Driver | None, torch: Torch | None) -> str:
    """Why CUDA cannot be used, in one sentence; "" where it can."""
    if driver is None:
        return "there is no NVIDIA driver"
    if driver.error:
        return f"the NVIDIA driver cannot be initialised: {driver.error}"
    if not driver.devices:
        return "the NVIDIA driver finds no GPU"
    if torch is None:
        return "torch is not installed; it is the extra 'cuda': pip install '.[cuda]'"
    return _obstacle_of_torch(driver, torch)


def _obstacle_of_torch(driver: Driver, torch: Torch) -> str:
    if not torch.cuda or not torch.devices:
        cuda = f"CUDA {torch.cuda}" if torch.cuda else "none"
        return f"the driver supports CUDA {_text(driver.version)}, torch {torch.version} has {cuda}"
    if torch.architectures and not has_kernels(torch.capability, torch.architectures):
        return (
            f"torch {torch.version} has no kernels for {torch.name} with compute capability {_text(torch.capability)}; "
            f"it has {', '.join(torch.architectures)}"
        )
    return ""


def has_kernels(capability: tuple[int, int], architectures: tuple[str, ...]) -> bool:
    """Whether code for one of the architectures runs on a GPU of this compute capability.

    Binary code (sm_XY) runs on the same major version from its minor version on, PTX (compute_XY) on any later one
    (CUDA C++ Programming Guide, "Binary Compatibility" and "PTX Compatibility"). Suffixes a and f name one version.
    """
    for architecture in architectures:
        kind, _, number = architecture.partition("_")
        digits = number.rstrip("af")
        if not digits.isdigit():
            continue
        target = (int(digits[:-1]), int(digits[-1]))
        if number != digits:
            fits = target == capability
        elif kind == "compute":
            fits = target <= capability
        else:
            fits = target[0] == capability[0] and target[1] <= capability[1]
        if fits:
            return True
    return False


def _text(version: tuple[int, int] | None) -> str:
    return f"{version[0]}.{version[1]}" if version else "unknown"
