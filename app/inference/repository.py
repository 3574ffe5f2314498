"""Replaces a model by the one in its weights file, while requests run.

The new model is read, verified and warmed up in a thread beside the running one. The switch is one assignment on the
event loop. Requests that started before it finish on the old model, which is released after the last of them.
"""

import asyncio
import logging
from collections.abc import Callable
from time import perf_counter
from typing import Literal, Protocol

from app import engines, memory
from app.errors import ThirtytwoError, WeightsError
from app.inference.classifier import Classifier
from app.inference.shadow import Shadow
from app.model.file_watch import FileWatch
from app.model.weights import Weights

RELEASE_POLL_S = 0.05

Outcome = Literal["success", "unchanged", "failure"]

logger = logging.getLogger(__name__)


class Slot(Protocol):
    """Where the model is: the pipeline, or the shadow, which may have none."""

    @property
    def classifier(self) -> Classifier | None: ...

    def replace(self, classifier: Classifier) -> Classifier | None:
        """Switches to another one; returns the former."""
        ...


class Repository:
    """Belongs to one event loop. `read` and `build` run in a thread and may raise any exception.

    `on_switch` gets the new model just before its first request, `on_load` the outcome of each load. `role` names the
    slot in the log.
    """

    def __init__(
        self,
        slot: Slot,
        read: Callable[[], Weights],
        build: Callable[[Weights], Classifier],
        on_switch: Callable[[Classifier], None] = lambda classifier: None,
        on_load: Callable[[Outcome], None] = lambda outcome: None,
        role: str = "model",
    ) -> None:
        self._slot = slot
        self._read = read
        self._build = build
        self._on_switch = on_switch
        self._on_load = on_load
        self._role = role
        self._file_sha256 = slot.classifier.weights.sha256 if slot.classifier else ""  # of the last file that served
        self._loading = asyncio.Lock()
        self._releases: set[asyncio.Task[None]] = set()

    async def load(self, version: str | None = None) -> Outcome:
        """Loads the weights file; a file that cannot be served leaves the running model. One load at a time.

        A file that served before is loaded again only if its `version` is given, since another may have been promoted.
        The load of a version that the file does not have is a failure.
        """
        async with self._loading:
            outcome = await self._load(version)
        self._on_load(outcome)
        return outcome

    async def load_on_change(self, watch: FileWatch, interval_s: float) -> None:
        """Loads for ever, in a thread: a file system that does not answer must not block the event loop."""
        while True:
            await asyncio.sleep(interval_s)
            if await asyncio.to_thread(watch.changed):
                await self.load()

    async def promote(self, shadow: Shadow, version: str) -> Outcome:
        """Moves the shadow's model to this slot; a failure if it no longer has the version."""
        async with self._loading:
            outcome = self._promote(shadow, version)
        self._on_load(outcome)
        return outcome

    def _promote(self, shadow: Shadow, version: str) -> Outcome:
        classifier = shadow.release(version)
        if classifier is None:  # it was replaced, or has failed, meanwhile
            current = _name(self._slot.classifier)
            logger.error("%s: %s stays: the shadow no longer has the version %s", self._role, current, version[:8])
            return "failure"
        self._switch(classifier)
        return "success"

    async def _load(self, version: str | None) -> Outcome:
        start, current = perf_counter(), _name(self._slot.classifier)
        try:
            classifier = await asyncio.to_thread(self._build_another, version)
        except Exception as error:
            known = isinstance(error, ThirtytwoError)
            logger.error("%s: %s stays: %s", self._role, current, error, exc_info=not known)
            return "failure"
        if classifier is None:
            logger.info("%s: %s stays: the weights file is the same", self._role, current)
            return "unchanged"
        self._file_sha256 = classifier.weights.sha256
        self._switch(classifier)
        logger.info("%s: loaded in %.2f s", self._role, perf_counter() - start)
        return "success"

    def _build_another(self, version: str | None) -> Classifier | None:
        """The file's model, ready to serve; None if it serves already, or served before."""
        file = self._read()
        _check_version(file, version)
        current = self._slot.classifier
        serves = current is not None and current.weights.sha256 == file.sha256
        if serves or (version is None and file.sha256 == self._file_sha256):
            return None
        classifier = self._build(file)
        _check_version(classifier.weights, version)  # the engine process may have loaded a later file
        memory.trim()  # of the compilation
        return classifier

    def _switch(self, classifier: Classifier) -> None:
        self._on_switch(classifier)
        previous = self._slot.replace(classifier)
        logger.info("%s: %s replaces %s", self._role, _name(classifier), _name(previous))
        if previous is not None:
            release = asyncio.create_task(_release(previous))
            self._releases.add(release)
            release.add_done_callback(self._releases.discard)


def _check_version(file: Weights, version: str | None) -> None:
    if version is not None and file.version != version:
        raise WeightsError(f"The weights file has the version {file.version}, not {version[:8]}.")


def _name(classifier: Classifier | None) -> str:
    return f"{classifier.weights.card.name} {classifier.weights.version}" if classifier else "none"


async def _release(classifier: Classifier) -> None:
    """Drops the last reference in a thread, since the engine stops its threads then; returns the memory."""
    while classifier.users:
        await asyncio.sleep(RELEASE_POLL_S)
    last, device = [classifier], classifier.engine.device
    del classifier
    await asyncio.to_thread(engines.release, last, device)
