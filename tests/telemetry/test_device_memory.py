import threading
import time

import pytest

from app.telemetry import device_memory


def test_memory_is_observed_at_once_and_again() -> None:
    readings = iter([(1, 9), (2, 9), (3, 9)])
    observed: list[tuple[int, int]] = []
    done = threading.Event()

    def observe(used: int, total: int) -> None:
        observed.append((used, total))
        if len(observed) == 3:
            done.set()

    stop = device_memory.start(lambda: next(readings), observe, 0.001)
    assert observed[0] == (1, 9)
    assert done.wait(30)
    stop()
    assert observed == [(1, 9), (2, 9), (3, 9)]


def test_device_without_own_memory_needs_no_thread() -> None:
    before = set(threading.enumerate())
    device_memory.start(lambda: None, lambda used, total: None, 0.001)
    assert set(threading.enumerate()) <= before  # one of an earlier test may end meanwhile


def test_call_that_does_not_return_blocks_nobody() -> None:
    """The driver hangs from the second call on."""
    first, hung = threading.Event(), threading.Event()

    def read() -> tuple[int, int]:
        if first.is_set():
            hung.set()
            threading.Event().wait(60)
        first.set()
        return 1, 9

    stop = device_memory.start(read, lambda used, total: None, 0.001)
    assert hung.wait(30)
    stop()


def test_lost_device_ends_the_observation_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    def read() -> tuple[int, int]:
        raise RuntimeError("CUDA error: unspecified launch failure")

    device_memory.start(read, lambda used, total: None, 0.001)
    time.sleep(0.01)
    (record,) = caplog.records
    assert record.getMessage() == "the device's memory cannot be read: CUDA error: unspecified launch failure"
