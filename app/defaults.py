"""Settings that follow from the device where they are 0."""

from collections.abc import Callable
from importlib.util import find_spec
from math import floor

from app.engines.cuda import Driver, query_driver

CPU_MAX_BATCH, GPU_MAX_BATCH = 64, 1024
CPU_BATCH_PIXELS, GPU_BATCH_PIXELS = 1 << 20, 1 << 24  # those of as many images of 128 x 128
MAX_QUEUE = 512
GPU_QUEUE_S = 0.25  # of work at the measured rate
GPU_MAX_QUEUE = 16_384
GPU_WORKERS = 16
GPU_CPU_SHARE = 0.75  # of the CPUs for front ends; the others are left to the engine process and the driver


def max_batch(setting: int, device: str, input_size: int = 1) -> int:
    """Images in the largest batch: by default fewer where they are large, as memory and start-up time follow pixels.

    An `input_size` that is not known is 1.
    """
    if setting:
        return setting
    images, pixels = (GPU_MAX_BATCH, GPU_BATCH_PIXELS) if is_gpu(device) else (CPU_MAX_BATCH, CPU_BATCH_PIXELS)
    return max(1, min(images, pixels // input_size**2))


def max_queue(setting: int, device: str, max_files: int, images_per_s: Callable[[], float], workers: int) -> int:
    """Images that one of `workers` front ends queues; at least those of one request. The rate is of all together."""
    if setting:
        return setting
    if not is_gpu(device):
        return max(MAX_QUEUE, max_files)
    share = floor(images_per_s() * GPU_QUEUE_S / workers)
    return max(MAX_QUEUE, max_files, min(GPU_MAX_QUEUE, share))


def workers(setting: int, device: str, cpus: int, query_driver: Callable[[], Driver | None] = query_driver) -> int:
    """HTTP processes. On a GPU one event loop is slower than the network; on a CPU both share the same cores."""
    if setting:
        return setting
    if not (is_gpu(device) or (device == "auto" and _has_gpu(query_driver()))):
        return 1
    return max(1, min(GPU_WORKERS, floor(cpus * GPU_CPU_SHARE)))


def is_gpu(device: str) -> bool:
    return device.startswith("cuda")


def _has_gpu(driver: Driver | None) -> bool:
    """Without an import of torch: if it cannot use the GPU, the front ends share an engine on the CPU."""
    return driver is not None and driver.devices > 0 and find_spec("torch") is not None
