"""Observes a device's memory in a thread of its own: a call of the driver may take long, or not return."""

import logging
import threading
from collections.abc import Callable

PERIOD_S = 5.0

Read = Callable[[], tuple[int, int] | None]

logger = logging.getLogger(__name__)


def start(read: Read, observe: Callable[[int, int], None], period_s: float = PERIOD_S) -> Callable[[], None]:
    """Observes (used, total) bytes once, then every period_s seconds until the returned function is called.

    Does nothing where `read` returns None. It ends with a warning when `read` raises.
    """
    stop = threading.Event()
    if _observe(read, observe):

        def run() -> None:
            while not stop.wait(period_s) and _observe(read, observe):
                pass

        threading.Thread(target=run, name="memory", daemon=True).start()
    return stop.set


def _observe(read: Read, observe: Callable[[int, int], None]) -> bool:
    try:
        memory = read()
    except Exception as error:
        logger.warning("the device's memory cannot be read: %s", error)
        return False
    if memory is None:
        return False
    observe(*memory)
    return True
