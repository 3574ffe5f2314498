"""Notices that the inference thread has died or hangs, and ends the process so that a supervisor restarts it."""

import asyncio
import logging
import signal
from time import monotonic
from typing import Any

from app.inference.batcher import Batcher
from app.lifecycle import Lifecycle, Phase

PERIOD_S = 0.5

logger = logging.getLogger(__name__)


async def watch(batcher: Batcher[Any, Any], lifecycle: Lifecycle, limit_s: float) -> None:
    """Runs until cancelled, or until a batch runs for longer than limit_s, a thread dies, or the device is lost."""
    while (reason := _failure(batcher, limit_s)) is None:
        await asyncio.sleep(PERIOD_S)
    logger.critical("%s; exiting", reason)
    lifecycle.phase = Phase.FAILED
    batcher.abort()
    signal.raise_signal(signal.SIGTERM)


def _failure(batcher: Batcher[Any, Any], limit_s: float) -> str | None:
    if batcher.failure is not None:
        return f"inference failed: {batcher.failure}"
    if not batcher.alive:
        return "an inference thread died"
    start = batcher.oldest_start
    if start is not None and monotonic() - start > limit_s:
        return f"an inference thread stalled for {limit_s:g} s"
    return None
