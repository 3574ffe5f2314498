"""Replaces the model that serves by the one in the weights file, while requests run.

The new model is read, verified and warmed up in a thread beside the running one. The switch is one assignment on the
event loop. Requests that started before it finish on the old model, which is released after the last of them.
"""

import asyncio
import logging
from collections.abc import Callable
from time import perf_counter
from typing import Literal

from app import engines, memory
from app.errors import ThirtytwoError
from app.inference.classifier import Classifier
from app.inference.pipeline import Pipeline
from app.model.file_watch import FileWatch
from app.model.weights import Weights

RELEASE_POLL_S = 0.05

Outcome = Literal["success", "unchanged", "failure"]

logger = logging.getLogger(__name__)


class Repository:
    """Belongs to one event loop. `read` and `build` run in a thread and may raise any exception.

    `on_switch` gets the new model just before its first request, `on_load` the outcome of each load.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        read: Callable[[], Weights],
        build: Callable[[Weights], Classifier],
        on_switch: Callable[[Classifier], None] = lambda classifier: None,
        on_load: Callable[[Outcome], None] = lambda outcome: None,
    ) -> None:
        self._pipeline = pipeline
        self._read = read
        self._build = build
        self._on_switch = on_switch
        self._on_load = on_load
        self._loading = asyncio.Lock()
        self._releases: set[asyncio.Task[None]] = set()

    async def load(self) -> Outcome:
        """Loads the weights file; a file that cannot be served leaves the running model. One load at a time."""
        async with self._loading:
            outcome = await self._load()
        self._on_load(outcome)
        return outcome

    async def load_on_change(self, watch: FileWatch, interval_s: float) -> None:
        """Loads for ever, in a thread: a file system that does not answer must not block the event loop."""
        while True:
            await asyncio.sleep(interval_s)
            if await asyncio.to_thread(watch.changed):
                await self.load()

    async def _load(self) -> Outcome:
        start, current = perf_counter(), self._pipeline.classifier.weights
        try:
            classifier = await asyncio.to_thread(self._build_another, current.sha256)
        except Exception as error:
            known = isinstance(error, ThirtytwoError)
            logger.error("%s %s serves on: %s", current.card.name, current.version, error, exc_info=not known)
            return "failure"
        if classifier is None:
            logger.info("%s %s serves on: the weights file has the same version", current.card.name, current.version)
            return "unchanged"
        self._switch(classifier)
        new, seconds = classifier.weights, perf_counter() - start
        names = new.card.name, new.version, current.card.name, current.version
        logger.info("%s %s replaces %s %s; loaded in %.2f s", *names, seconds)
        return "success"

    def _build_another(self, sha256: str) -> Classifier | None:
        """The file's model, ready to serve; None if it has the given digest."""
        weights = self._read()
        return None if weights.sha256 == sha256 else self._build(weights)

    def _switch(self, classifier: Classifier) -> None:
        self._on_switch(classifier)
        previous, self._pipeline.classifier = self._pipeline.classifier, classifier
        release = asyncio.create_task(_release(previous))
        self._releases.add(release)
        release.add_done_callback(self._releases.discard)


async def _release(classifier: Classifier) -> None:
    """Drops the last reference in a thread, since the engine stops its threads then; returns the memory."""
    while classifier.users:
        await asyncio.sleep(RELEASE_POLL_S)
    last = [classifier]
    del classifier
    await asyncio.to_thread(_drop, last)


def _drop(references: list[Classifier]) -> None:
    device = references[0].engine.device
    references.clear()
    engines.release_cache(device)
    memory.trim()
