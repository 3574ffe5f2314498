import pytest

from app import defaults
from app.engines.cuda import Driver

GPU = Driver((13, 0), 1)


def unmeasured() -> float:
    raise AssertionError


def test_batches_are_larger_on_a_gpu() -> None:
    assert defaults.max_batch(0, "cpu", 32) == 64
    assert defaults.max_batch(0, "cuda:1", 32) == 1024
    assert defaults.max_batch(7, "cuda", 1024) == 7


@pytest.mark.parametrize(
    ("device", "size", "images"),
    [("cpu", 128, 64), ("cpu", 224, 20), ("cpu", 1024, 1), ("cuda", 128, 1024), ("cuda", 224, 334), ("cuda", 1024, 16)],
)
def test_batches_of_large_images_are_smaller(device: str, size: int, images: int) -> None:
    assert defaults.max_batch(0, device, size) == images


@pytest.mark.parametrize(
    ("images_per_s", "workers", "limit"),
    [(100.0, 1, 512), (40_000.0, 1, 10_000), (1e6, 1, 16_384), (40_000.0, 4, 2500), (40_000.0, 16, 625)],
)
def test_queue_on_a_gpu_holds_a_quarter_of_a_second(images_per_s: float, workers: int, limit: int) -> None:
    assert defaults.max_queue(0, "cuda", 256, lambda: images_per_s, workers) == limit


def test_queue_on_a_cpu_needs_no_measurement() -> None:
    assert defaults.max_queue(0, "cpu", 256, unmeasured, 1) == 512
    assert defaults.max_queue(0, "cpu", 2000, unmeasured, 1) == 2000  # the largest request fits
    assert defaults.max_queue(99, "cuda", 50, unmeasured, 1) == 99


@pytest.mark.parametrize(
    ("setting", "device", "driver", "cpus", "workers"),
    [
        (0, "cpu", GPU, 16, 1),
        (0, "auto", None, 16, 1),
        (0, "auto", Driver((13, 0), 0), 16, 1),
        (0, "auto", GPU, 16, 12),
        (0, "cuda:0", None, 64, 16),
        (0, "cuda", None, 1, 1),
        (3, "cpu", None, 16, 3),
    ],
)
def test_front_ends_follow_the_cpus_on_a_gpu(
    setting: int, device: str, driver: Driver | None, cpus: int, workers: int
) -> None:
    assert defaults.workers(setting, device, cpus, lambda: driver) == workers
