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
from pathlib import Path
from typing import Any

import anyio
from fastapi import FastAPI
from starlette.types import Lifespan

from app import engines
from app.api.auth import ApiKeys
from app.engines import Engine
from app.engines.hardware import available_cpus
from app.errors import DeviceError, SettingsError
from app.inference.batcher import Batcher
from app.inference.bisection import batch_sizes
from app.inference.classifier import Classifier, Scores
from app.inference.decoding import DecodePool
from app.inference.pipeline import Pipeline
from app.inference.queue import RequestQueue
from app.inference.repository import Repository
from app.inference.shadow import Shadow
from app.model import preprocessing, weights
from app.model.file_watch import FileWatch
from app.model.preprocessing import DecodedImage, Limits
from app.model.weights import Weights
from app.process.lifecycle import Lifecycle, Phase, watch
from app.settings import PREFIX, Settings
from app.state import State
from app.telemetry.metrics import Metrics
from app.telemetry.statistics import Statistics

LoadEngine = Callable[[Weights, Settings], Engine]

logger = logging.getLogger(__name__)

CLOSE_S = 0.3  # for the batches and files in progress; the drain before it has answered what was accepted in time
SMALL_CALLERS = 8  # the last eighth of the queue is for them
KEYS_RELOAD_S = 0.4  # two reads that agree take less than a second
GIL_SWITCH_INTERVAL_S = 0.0005  # a tenth of Python's own: a finished batch waits that long for a busy event loop


def lifespan(
    settings: Settings, metrics: Metrics, load_engine: LoadEngine, exit_process: Callable[[int], None]
) -> Lifespan[FastAPI]:
    """Loads, verifies and warms up the model, then yields the state that requests use.

    `exit_process` ends the process with a status after a failure: a stalled inference thread blocks a normal exit.
    """

    @asynccontextmanager
    async def run(app: FastAPI) -> AsyncIterator[dict[str, Any]]:
        lifecycle, statistics = Lifecycle(), Statistics()
        file_watch = FileWatch(settings.weights)
        classifier = build_classifier(settings, load_engine)
        pipeline = build_pipeline(settings, classifier, _observer(metrics, statistics))
        _describe(metrics, classifier)
        _name(metrics, classifier)
        del classifier  # another one may replace it
        repository = build_repository(settings, load_engine, pipeline, metrics)
        candidates = add_shadow(settings, load_engine, pipeline, metrics) if settings.shadow_weights else None
        keys = ApiKeys([key.get_secret_value() for key in settings.api_keys], settings.api_keys_file)
        lifecycle.on_reload.append(partial(asyncio.to_thread, keys.reload))
        if keys.disabled:
            logger.warning("no API keys are set: the service is open to all clients")
        lifecycle.on_reload.append(repository.load)
        with _parser_thread() as executor:
            preprocessing.load_decoders()
            await _preload_static_files()
            pipeline.start()
            tasks = [asyncio.create_task(keys.reload_every(KEYS_RELOAD_S))]
            if settings.weights_poll_s:
                tasks.append(asyncio.create_task(repository.load_on_change(file_watch, settings.weights_poll_s)))
            if candidates and settings.shadow_weights:
                tasks.append(asyncio.create_task(_load_shadow(candidates, settings.shadow_weights, settings)))
                lifecycle.on_reload.append(candidates.load)
            tasks.append(asyncio.create_task(watch(pipeline.batcher, lifecycle, settings.inference_timeout_s)))
            lifecycle.phase = Phase.READY
            sys.setswitchinterval(GIL_SWITCH_INTERVAL_S)
            gc.freeze()  # what exists now stays: collections need not traverse the libraries again
            yield {"service": State(settings, lifecycle, metrics, keys, statistics, pipeline, repository, executor)}
            for task in tasks:
                task.cancel()
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
    """The engine that the settings name; the workers share the CPUs. Raises WeightsError or DeviceError."""
    threads = settings.threads or max(1, available_cpus() // settings.workers)
    options = settings.device, threads, settings.engine, settings.precision, settings.early_exit
    return engines.load(weights, *options)


def build_classifier(settings: Settings, load_engine: LoadEngine) -> Classifier:
    """The settings' weights on the settings' engine, verified and warmed up; raises WeightsError or SettingsError."""
    return classifier_of(weights.load(settings.weights), settings, load_engine)


def classifier_of(file: Weights, settings: Settings, load_engine: LoadEngine) -> Classifier:
    """The file on the settings' engine, verified and warmed up; raises WeightsError or SettingsError."""
    try:
        engine = load_engine(file, settings)
    except DeviceError as error:
        raise SettingsError(f"{PREFIX}DEVICE, {PREFIX}ENGINE, {PREFIX}PRECISION: {error}") from error
    return Classifier(file, engine, batch_sizes(settings.max_batch))


def build_pipeline(
    settings: Settings, classifier: Classifier, on_batch: Callable[[int, float], None] = lambda size, seconds: None
) -> Pipeline:
    """Decoder threads, queue and inference threads in front of the classifier, not yet started."""
    queue: RequestQueue[DecodedImage, Scores] = RequestQueue(settings.max_queue, *queue_shares(settings))
    limits = Limits(classifier.input_size, settings.max_pixels, settings.strict_size, preprocessing.measure_slowdown())
    batcher = Batcher(batch_sizes(settings.max_batch), queue, classifier.engine.streams, on_batch)
    return Pipeline(classifier, DecodePool(limits, settings.max_request_pixels), batcher)


def queue_shares(settings: Settings) -> tuple[int, int]:
    """Images that one caller may hold in the queue, and the places left for callers that hold no more than so many.

    A request of MAX_FILES must fit into both.
    """
    caller_limit = max(settings.max_files, int(settings.max_queue * settings.max_queue_share))
    small_limit = 0 if caller_limit >= settings.max_queue else settings.max_queue // SMALL_CALLERS
    return caller_limit, min(small_limit, settings.max_queue - settings.max_files)


def build_repository(settings: Settings, load_engine: LoadEngine, pipeline: Pipeline, metrics: Metrics) -> Repository:
    """Loads the settings' weights path again, on the same engine."""

    def build(file: Weights) -> Classifier:
        classifier = classifier_of(file, settings, load_engine)
        _describe(metrics, classifier)
        return classifier

    return Repository(
        pipeline,
        partial(weights.load, settings.weights),
        build,
        partial(_name, metrics),
        lambda outcome: metrics.loads.labels(outcome).inc(),
    )


def add_shadow(settings: Settings, load_engine: LoadEngine, pipeline: Pipeline, metrics: Metrics) -> Repository:
    """Gives the pipeline a shadow without a model; the repository loads SHADOW_WEIGHTS into it."""

    def is_busy() -> bool:
        return pipeline.batcher.queue.size > 0 or pipeline.batcher.oldest_start is not None

    pipeline.shadow = Shadow(pipeline.limits, settings.shadow_sample, is_busy, metrics.observe_shadow)

    def read() -> Weights:
        assert settings.shadow_weights is not None
        return weights.load(settings.shadow_weights)

    def build(file: Weights) -> Classifier:
        classifier = classifier_of(file, settings, load_engine)
        _describe(metrics, classifier)  # it may be promoted
        return classifier

    return Repository(pipeline.shadow, read, build, role="shadow")


async def _load_shadow(candidates: Repository, path: Path, settings: Settings) -> None:
    """Once at the start, since the service must not wait for it, then whenever the file changes."""
    file_watch = FileWatch(path)
    await candidates.load()
    if settings.weights_poll_s:
        await candidates.load_on_change(file_watch, settings.weights_poll_s)


def _observer(metrics: Metrics, statistics: Statistics) -> Callable[[int, float], None]:
    def observe(size: int, seconds: float) -> None:
        metrics.observe_batch(size, seconds)
        statistics.observe_batch(size, seconds)

    return observe


def _describe(metrics: Metrics, classifier: Classifier) -> None:
    metrics.describe_model(classifier.classes, max(1, len(classifier.weights.card.stages)))


def _name(metrics: Metrics, classifier: Classifier) -> None:
    weights, engine = classifier.weights, classifier.engine
    names = weights.card.name, weights.version, engine.name, engine.device, engine.precision
    metrics.name_model(*names, exit_shares=weights.card.exit_shares())
