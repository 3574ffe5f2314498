"""Where a model comes from: the weights file of the settings, or the engine process that has loaded it."""

import logging
from collections.abc import Callable
from socket import socket
from typing import Protocol

from uvicorn.config import STARTUP_FAILURE

from app import defaults, engines
from app.engines import Engine, remote
from app.engines.remote import RemoteEngine
from app.errors import DeviceError, DeviceLostError, SettingsError, WeightsError
from app.inference.bisection import batch_sizes
from app.inference.classifier import Classifier
from app.model import weights
from app.model.file_watch import Fingerprint, fingerprint
from app.model.weights import Weights, printable
from app.settings import PREFIX, Settings

logger = logging.getLogger(__name__)

LoadEngine = Callable[[Weights, Settings], Engine]


class Source(Protocol):
    """All methods block. `build` is called with what `read` returned; it may return a later file's model."""

    def start(self) -> tuple[Classifier, Fingerprint | None]:
        """The first model, and its file before it was read."""
        ...

    def read(self) -> Weights: ...

    def build(self, file: Weights) -> Classifier: ...


class FileSource:
    """The settings' file on the settings' engine; raises WeightsError or SettingsError."""

    def __init__(self, settings: Settings, load_engine: LoadEngine, sizes_per_octave: int = 2) -> None:
        self._settings = settings
        self._load_engine = load_engine
        self._sizes_per_octave = sizes_per_octave

    def start(self) -> tuple[Classifier, Fingerprint | None]:
        file = self.fingerprint()
        return self.build(self.read()), file

    def fingerprint(self) -> Fingerprint | None:
        return fingerprint(self._settings.weights)

    def read(self) -> Weights:
        return weights.load(self._settings.weights)

    def build(self, file: Weights) -> Classifier:
        try:
            engine = self._load_engine(file, self._settings)
            size = file.card.input_size
            largest = defaults.max_batch(self._settings.max_batch, engine.device, size)
            logger.info("at most %d images of %d x %d pixels in a batch", largest, size, size)
            return Classifier(file, engine, batch_sizes(largest, self._sizes_per_octave))
        except WeightsError as error:
            raise WeightsError(f"{printable(self._settings.weights)}: {error}") from error
        except DeviceError as error:
            raise SettingsError(f"{PREFIX}DEVICE, {PREFIX}ENGINE, {PREFIX}PRECISION: {error}") from error


class EngineProcessSource:
    """The model of the engine process; raises WeightsError with its reason, or DeviceLostError if it exits."""

    def __init__(self, link: socket, exit_process: Callable[[int], None]) -> None:
        self._link = link
        self._exit_process = exit_process

    def start(self) -> tuple[Classifier, Fingerprint | None]:
        """Without a log line of its own if the engine process exits before: that process has logged the cause."""
        try:
            engine = RemoteEngine(self._link)
        except DeviceLostError:
            self._exit_process(STARTUP_FAILURE)
            raise
        return _remote_classifier(engine), engine.fingerprint

    def read(self) -> Weights:
        return remote.load(self._link)

    def build(self, file: Weights) -> Classifier:
        return _remote_classifier(RemoteEngine(self._link))


def _remote_classifier(engine: RemoteEngine) -> Classifier:
    return Classifier(engine.weights, engine, range(1, engine.max_batch + 1))  # the engine process chooses the sizes


def load_engine(weights: Weights, settings: Settings) -> Engine:
    """The engine that the settings name. Raises WeightsError or DeviceError."""
    options = settings.device, settings.threads, settings.engine, settings.precision, settings.early_exit
    return engines.load(weights, *options)
