"""Builds the service's state at start-up and takes it down at the end."""

import asyncio
import gc
import logging
import mimetypes
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import asynccontextmanager, closing, contextmanager
from functools import partial
from math import inf
from pathlib import Path
from socket import socket
from typing import Any

import anyio
from fastapi import FastAPI
from starlette.types import Lifespan

from app import defaults
from app.api.auth import ApiKeys
from app.api.parse_thread import ParseThread
from app.engines.remote import RemoteEngine
from app.inference.batcher import Batcher
from app.inference.classifier import Classifier, Scores
from app.inference.decoding import DecodePool
from app.inference.pipeline import Pipeline
from app.inference.queue import RequestQueue
from app.inference.repository import Repository
from app.inference.shadow import Shadow
from app.model import preprocessing
from app.model.file_watch import FileWatch
from app.model.preprocessing import DecodedImage, Limits
from app.model.weights import Weights
from app.process.lifecycle import Lifecycle, Phase, watch
from app.settings import Settings
from app.sources import EngineProcessSource, FileSource, LoadEngine, Source
from app.state import State
from app.telemetry import capacity, device_memory
from app.telemetry.capacity import BusyShare, EngineUsage
from app.telemetry.drift import DriftMonitor
from app.telemetry.metrics import Metrics
from app.telemetry.statistics import Statistics

logger = logging.getLogger(__name__)

CLOSE_S = 0.3  # for the batches and files in progress; the drain before it has answered what was accepted in time
SMALL_CALLERS = 8  # the last eighth of the queue is for them
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
        source = FileSource(settings, load_engine) if link is None else EngineProcessSource(link, exit_process)
        classifier, file = source.start()
        file_watch = FileWatch(settings.weights, file)
        # with a link, the engine process has the metrics of batches
        usage = EngineUsage(classifier.cost) if link is None else None
        observe_batch = _observer(metrics, statistics, usage) if usage else statistics.observe_batch
        pipeline = build_pipeline(settings, classifier, observe_batch)
        metrics.queue_limit.set(pipeline.batcher.queue.limit)
        drift = DriftMonitor(metrics)
        on_switch = partial(_start, metrics, drift, settings.early_exit)
        _describe(metrics, classifier)
        on_switch(classifier)
        del classifier  # another one may replace it
        repository = build_repository(source, pipeline, metrics, on_switch)
        candidates = add_shadow(settings, load_engine, pipeline, metrics) if settings.shadow_weights else None
        keys = ApiKeys([key.get_secret_value() for key in settings.api_keys], settings.api_keys_file)
        lifecycle.on_reload.append(partial(asyncio.to_thread, keys.reload))
        if keys.disabled:
            logger.warning("no API keys are set: the service is open to all clients")
        lifecycle.on_reload.append(repository.load)
        with closing(ParseThread()) as parse_thread, _render_thread() as render_executor:
            preprocessing.load_decoders()
            await _preload_static_files()
            pipeline.start()
            # a batch in the engine process waits for those of other front ends; that process has the watchdog
            limit_s = settings.inference_timeout_s if link is None else inf
            works = [
                keys.reload_every(KEYS_RELOAD_S),
                watch(pipeline.batcher, lifecycle, limit_s),
                capacity.repeat(_sampler(pipeline, metrics, usage)),
            ]
            if settings.weights_poll_s:
                works.append(repository.load_on_change(file_watch, settings.weights_poll_s))
            if candidates and settings.shadow_weights:
                works.append(_load_shadow(candidates, settings.shadow_weights, settings))
                lifecycle.on_reload.append(candidates.load)
            tasks = [_start_task(work) for work in works]
            stop_observing = _observe_memory(pipeline, metrics)
            lifecycle.phase = Phase.READY
            sys.setswitchinterval(GIL_SWITCH_INTERVAL_S)
            gc.freeze()  # what exists now stays: collections need not traverse the libraries again
            threads = parse_thread, render_executor
            state = State(settings, lifecycle, metrics, drift, keys, statistics, pipeline, repository, *threads)
            yield {"service": state}
            stop_observing()
            for task in tasks:
                task.cancel()
            if lifecycle.phase is Phase.FAILED:
                exit_process(1)
            lifecycle.phase = Phase.STOPPING
            pipeline.close(CLOSE_S)

    return run


def _start_task(work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
    task = asyncio.create_task(work)
    task.add_done_callback(_log_failure)
    return task


def _log_failure(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()):
        logger.error("a background task failed", exc_info=error)


@contextmanager
def _render_thread() -> Iterator[Executor]:
    executor = ThreadPoolExecutor(1, "render")
    try:
        yield executor
    finally:
        executor.shutdown(cancel_futures=True)  # nobody waits for what has not begun


async def _preload_static_files() -> None:
    """Loads what the first static file would load on the event loop: media types, anyio's files and threads; 15 ms."""
    mimetypes.init()
    async with await anyio.open_file(__file__):
        pass


def build_pipeline(
    settings: Settings, classifier: Classifier, on_batch: Callable[[int, float], None] = lambda size, seconds: None
) -> Pipeline:
    """Decoder threads, queue and inference threads in front of the classifier, not yet started."""
    max_queue = _max_queue(settings, classifier)
    shares = queue_shares(max_queue, settings.max_files, settings.max_queue_share)
    queue: RequestQueue[DecodedImage, Scores] = RequestQueue(max_queue, *shares)
    limits = Limits(classifier.input_size, settings.max_pixels, settings.strict_size, preprocessing.measure_slowdown())
    engine = classifier.engine
    merges_calls = isinstance(engine, RemoteEngine)
    batcher = Batcher(classifier.batch_sizes, queue, engine.streams, on_batch, merges_calls)
    return Pipeline(classifier, DecodePool(limits, settings.max_request_pixels), batcher)


def queue_shares(max_queue: int, max_files: int, share: float) -> tuple[int, int]:
    """Images that one caller may hold in the queue, and the places left for callers that hold no more than so many.

    A request of `max_files` must fit into both.
    """
    caller_limit = max(max_files, int(max_queue * share))
    small_limit = 0 if caller_limit >= max_queue else max_queue // SMALL_CALLERS
    return caller_limit, min(small_limit, max_queue - max_files)


def build_repository(
    source: Source, pipeline: Pipeline, metrics: Metrics, on_switch: Callable[[Classifier], None]
) -> Repository:
    """Loads from the source again, on the same engine."""
    return Repository(
        pipeline,
        source.read,
        _describing(source, metrics),
        on_switch,
        lambda outcome: metrics.loads.labels(outcome).inc(),
    )


def add_shadow(settings: Settings, load_engine: LoadEngine, pipeline: Pipeline, metrics: Metrics) -> Repository:
    """Gives the pipeline a shadow without a model; the repository loads SHADOW_WEIGHTS into it."""

    def is_busy() -> bool:
        return pipeline.batcher.queue.size > 0 or pipeline.batcher.oldest_start is not None

    pipeline.shadow = Shadow(pipeline.limits, settings.shadow_sample, is_busy, metrics.observe_shadow)

    source = FileSource(settings.model_copy(update={"weights": settings.shadow_weights}), load_engine)
    return Repository(pipeline.shadow, source.read, _describing(source, metrics), role="shadow")  # it may be promoted


def _describing(source: Source, metrics: Metrics) -> Callable[[Weights], Classifier]:
    """The source's `build`, with the metrics of the model's classes and stages."""

    def build(file: Weights) -> Classifier:
        classifier = source.build(file)
        if isinstance(source, FileSource):
            _ = classifier.cost  # measured in this thread; the event loop reads it after the switch
        _describe(metrics, classifier)
        return classifier

    return build


async def _load_shadow(candidates: Repository, path: Path, settings: Settings) -> None:
    """Once at the start, since the service must not wait for it, then whenever the file changes."""
    file_watch = FileWatch(path)
    await candidates.load()
    if settings.weights_poll_s:
        await candidates.load_on_change(file_watch, settings.weights_poll_s)


def _max_queue(settings: Settings, classifier: Classifier) -> int:
    device, workers = classifier.engine.device, max(1, settings.workers)
    return defaults.max_queue(
        settings.max_queue, device, settings.max_files, lambda: classifier.cost.images_per_s, workers
    )


def _observe_memory(pipeline: Pipeline, metrics: Metrics) -> Callable[[], None]:
    """Of the device of the model that serves; a former model is not kept."""
    observe = partial(metrics.observe_memory, pipeline.classifier.engine.device)
    return device_memory.start(lambda: pipeline.classifier.engine.memory(), observe)


def _observer(metrics: Metrics, statistics: Statistics, usage: EngineUsage) -> Callable[[int, float], None]:
    def observe(size: int, seconds: float) -> None:
        metrics.observe_batch(size, seconds)
        statistics.observe_batch(size, seconds)
        usage.observe_batch(size, seconds)

    return observe


def _sampler(pipeline: Pipeline, metrics: Metrics, usage: EngineUsage | None) -> Callable[[], None]:
    """Writes queue size, capacity and the utilization of each resource; created and called on the event loop."""
    event_loop = BusyShare(lambda: (time.thread_time(),))
    decoder = BusyShare(lambda: pipeline.decoder_busy_s)

    def sample() -> None:
        metrics.observe_utilization("event_loop", event_loop.sample())
        metrics.observe_utilization("decoder", decoder.sample())
        metrics.queue.set(pipeline.batcher.queue.size)  # also here: a scrape reaches one of several processes
        if usage:
            metrics.observe_engine(*usage.sample(pipeline.classifier.cost))

    return sample


def _describe(metrics: Metrics, classifier: Classifier) -> None:
    metrics.describe_model(classifier.classes, max(1, len(classifier.weights.card.stages)))


def _start(metrics: Metrics, drift: DriftMonitor, early_exit: bool, classifier: Classifier) -> None:
    """The metrics of the model that serves from now on."""
    weights, engine = classifier.weights, classifier.engine
    names = weights.card.name, weights.version, engine.name, engine.device, engine.precision
    metrics.name_model(*names, exit_shares=weights.card.exit_shares() if early_exit else ())
    drift.start(weights.version, weights.card, early_exit)
