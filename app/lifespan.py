"""Builds the service's state at start-up and takes it down at the end."""

import asyncio
import gc
import logging
import mimetypes
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from math import inf
from socket import socket
from typing import Any

import anyio
from fastapi import FastAPI
from starlette.types import Lifespan
from uvicorn.config import STARTUP_FAILURE

from app import defaults, engines
from app.api.auth import ApiKeys
from app.engines import Engine
from app.engines.remote import RemoteEngine
from app.errors import DeviceError, DeviceLostError, SettingsError
from app.inference.batcher import Batcher, batch_sizes
from app.inference.classifier import Classifier, Scores
from app.inference.decoding import DecodePool
from app.inference.pipeline import Pipeline
from app.inference.queue import RequestQueue
from app.model import preprocessing, weights
from app.model.preprocessing import DecodedImage, Limits
from app.model.weights import Weights
from app.process.lifecycle import Lifecycle, Phase, watch
from app.settings import PREFIX, Settings
from app.state import State
from app.telemetry import device_memory
from app.telemetry.metrics import Metrics
from app.telemetry.statistics import Statistics

LoadEngine = Callable[[Weights, Settings], Engine]

logger = logging.getLogger(__name__)

CLOSE_S = 0.3  # for the batches and files in progress; the drain before it has answered what was accepted in time
KEYS_RELOAD_S = 0.4  # two reads that agree take less than a second
GIL_SWITCH_INTERVAL_S = 0.0005  # a tenth of Python's own: a finished batch waits that long for a busy event loop


def lifespan(
    settings: Settings,
    metrics: Metrics,
    load_engine: LoadEngine,
    exit_process: Callable[[int], None],
    link: socket | None = None,
) -> Lifespan[FastAPI]:
    """Loads, verifies and warms up the model, then yields the state that requests use.

    With a `link`, the engine process does so, and the batches of this process run there. `exit_process` ends the
    process with a status after a failure: a stalled inference thread blocks a normal exit.
    """

    @asynccontextmanager
    async def run(app: FastAPI) -> AsyncIterator[dict[str, Any]]:
        lifecycle, statistics = Lifecycle(), Statistics()
        classifier = build_classifier(settings, load_engine) if link is None else _connect(link, exit_process)
        keys = ApiKeys([key.get_secret_value() for key in settings.api_keys], settings.api_keys_file)
        lifecycle.on_reload.append(partial(asyncio.to_thread, keys.reload))
        if keys.disabled:
            logger.warning("no API keys are set: the service is open to all clients")
        observe_batch = _observer(metrics, statistics) if link is None else statistics.observe_batch
        pipeline = build_pipeline(settings, classifier, observe_batch)
        metrics.queue_limit.set(pipeline.batcher.queue.limit)
        _describe(metrics, classifier)
        with _parser_thread() as executor:
            preprocessing.load_decoders()
            await _preload_static_files()
            pipeline.start()
            reloads = asyncio.create_task(keys.reload_every(KEYS_RELOAD_S))
            # a batch in the engine process waits for those of other front ends; that process has the watchdog
            limit_s = settings.inference_timeout_s if link is None else inf
            watchdog = asyncio.create_task(watch(pipeline.batcher, lifecycle, limit_s))
            observe = partial(metrics.observe_memory, classifier.engine.device)
            stop_observing = device_memory.start(classifier.engine.memory, observe)
            lifecycle.phase = Phase.READY
            sys.setswitchinterval(GIL_SWITCH_INTERVAL_S)
            gc.freeze()  # what exists now stays: collections need not traverse the libraries again
            yield {"service": State(settings, lifecycle, metrics, keys, statistics, classifier, pipeline, executor)}
            stop_observing()
            watchdog.cancel()
            reloads.cancel()
            if lifecycle.phase is Phase.FAILED:
                exit_process(1)
            lifecycle.phase = Phase.STOPPING
            pipeline.close(CLOSE_S)

    return run


@contextmanager
def _parser_thread() -> Iterator[Executor]:
    executor = ThreadPoolExecutor(1, "parse")
    try:
        yield executor
    finally:
        executor.shutdown(cancel_futures=True)  # nobody waits for what has not begun


async def _preload_static_files() -> None:
    """Loads what the first static file would load on the event loop: media types, anyio's files and threads; 15 ms."""
    mimetypes.init()
    async with await anyio.open_file(__file__):
        pass


def load_engine(weights: Weights, settings: Settings) -> Engine:
    """The engine that the settings name. Raises WeightsError or DeviceError."""
    options = settings.device, settings.threads, settings.engine, settings.precision, settings.early_exit
    return engines.load(weights, *options)


def build_classifier(settings: Settings, load_engine: LoadEngine, sizes_per_octave: int = 2) -> Classifier:
    """The settings' weights on the settings' engine, verified and warmed up; raises WeightsError or SettingsError."""
    file = weights.load(settings.weights)
    try:
        engine = load_engine(file, settings)
        largest = defaults.max_batch(settings.max_batch, engine.device)
        return Classifier(file, engine, batch_sizes(largest, sizes_per_octave))
    except DeviceError as error:
        raise SettingsError(f"{PREFIX}DEVICE, {PREFIX}ENGINE, {PREFIX}PRECISION: {error}") from error


def _connect(link: socket, exit_process: Callable[[int], None]) -> Classifier:
    """The engine process's model. If that process exits before, this one exits, too, without a log line of its own."""
    try:
        engine = RemoteEngine(link)
    except DeviceLostError:
        exit_process(STARTUP_FAILURE)
        raise
    return Classifier(engine.weights, engine, range(1, engine.max_batch + 1))  # the engine process chooses the sizes


def build_pipeline(
    settings: Settings, classifier: Classifier, on_batch: Callable[[int, float], None] = lambda size, seconds: None
) -> Pipeline:
    """Decoder threads, queue and inference threads in front of the classifier, not yet started."""
    queue: RequestQueue[DecodedImage, Scores] = RequestQueue(_max_queue(settings, classifier))
    limits = Limits(classifier.input_size, settings.max_pixels, settings.strict_size, preprocessing.measure_slowdown())
    batcher = Batcher(
        classifier.classify,
        classifier.batch_sizes,
        queue,
        classifier.engine.streams,
        on_batch,
        classifier.verify,
    )
    return Pipeline(DecodePool(limits, settings.max_request_pixels), batcher)


def _max_queue(settings: Settings, classifier: Classifier) -> int:
    device, workers = classifier.engine.device, max(1, settings.workers)
    return defaults.max_queue(settings.max_queue, device, settings.max_files, classifier.measure_rate, workers)


def _observer(metrics: Metrics, statistics: Statistics) -> Callable[[int, float], None]:
    def observe(size: int, seconds: float) -> None:
        metrics.observe_batch(size, seconds)
        statistics.observe_batch(size, seconds)

    return observe


def _describe(metrics: Metrics, classifier: Classifier) -> None:
    weights, engine = classifier.weights, classifier.engine
    metrics.describe_model(classifier.classes, max(1, len(weights.card.stages)), weights.card.exit_shares())
    labels = weights.card.name, weights.version, engine.name, engine.device, engine.precision
    metrics.model_info.labels(*labels).set(1)
