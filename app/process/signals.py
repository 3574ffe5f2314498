"""Signals to shut down, as a process has received them."""

import math
import time
from collections.abc import Callable

REPEAT_S = 0.15  # until a further signal is a second one: timeout(1) signals its child and then the whole group


class ReceivedSignals:
    """Numbers of the signals so far. A repeat within REPEAT_S is the same one."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._numbers: list[int] = []
        self._last = -math.inf

    def __len__(self) -> int:
        return len(self._numbers)

    def add(self, number: int) -> bool:
        """False for a repeat. Called in the main thread between any two of its instructions."""
        now = self._clock()
        if now < self._last + REPEAT_S:
            return False
        self._numbers.append(number)
        self._last = now
        return True

    def count(self, number: int) -> int:
        return self._numbers.count(number)
