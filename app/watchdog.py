"""Notices that the inference thread has died or hangs, and ends the process so that a supervisor restarts it."""

import asyncio
import logging
import signal
from typing import Any

from app.inference.batcher import Batcher
from app.lifecycle import Lifecycle, Phase

PERIOD_S = 0.5

logger = logging.getLogger(__name__)


async def watch(batcher: Batcher[Any, Any], lifecycle: Lifecycle, limit_s: float) -> None:
    """Runs until cancelled, or until a pass of the network takes longer than limit_s or its thread is gone."""
    while batcher.stalled_s <= limit_s:
        await asyncio.sleep(PERIOD_S)
    logger.critical("the inference thread %s; the process ends", "hangs" if batcher.alive else "has died")
    lifecycle.phase = Phase.FAILED
    batcher.fail()
    signal.raise_signal(signal.SIGTERM)
