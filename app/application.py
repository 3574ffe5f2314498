"""The composition root: settings in, an ASGI application out. Everything with a life is built in the lifespan."""

import asyncio
import gc
import logging
import os
import sys
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from importlib.resources import files
from importlib.util import find_spec
from typing import Any

import fastapi_offline
import numpy as np
from fastapi import FastAPI
from numpy.typing import NDArray
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp, Lifespan, Receive, Scope

from app import __version__, engines, settings
from app.api import openapi, predict, problems, routes
from app.api.auth import Keys
from app.api.middleware import FastLane, RequestContext, TrustedHosts
from app.engines import Engine
from app.engines.hardware import available_cpus
from app.inference.batcher import Batcher, batch_sizes
from app.inference.classifier import Classifier
from app.lifecycle import Lifecycle, Phase, draining_signals, ending_with_parent
from app.model import preprocessing, weights
from app.model.preprocessing import Pixels
from app.model.weights import Weights
from app.oip.routes import router as inference_router
from app.oip.statistics import Statistics
from app.settings import Settings
from app.state import State
from app.telemetry.logs import AccessLog
from app.telemetry.metrics import Metrics
from app.watchdog import watch

LoadEngine = Callable[[Weights, str, int, str, str], Engine]

logger = logging.getLogger(__name__)

COLLECTOR = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")  # OpenTelemetry's own names
SWITCH_S = 0.0005  # a tenth of Python's own: a batch that is done waits that long for a busy event loop to let go
DESCRIPTION = "Classifies small images. Send one or many, get labels with probabilities."


def create_app(
    config: Settings | None = None, load_engine: LoadEngine = engines.load, end: Callable[[int], None] = os._exit
) -> ASGIApp:
    """The application for these settings, or for those of the environment; raises SettingsError.

    `end` leaves the process with a status where the inference thread hangs, since that keeps a normal exit waiting.
    """
    config = config or settings.load()
    metrics = Metrics()
    api = create_api(config, _lifespan(config, metrics, load_engine, end))
    app: ASGIApp = FastLane(api, config.root_path, "/predict", _predict, metrics)
    if config.cors_origins:
        app = CORSMiddleware(app, config.cors_origins, allow_methods=["GET", "POST"], allow_headers=["*"])
    if config.allowed_hosts:
        app = TrustedHosts(app, config.allowed_hosts)
    access = AccessLog(config.log_format) if config.log_level in ("debug", "info") else None
    return _traced(RequestContext(app, metrics, access, config.max_held_bytes))


def _traced(app: ASGIApp) -> ASGIApp:
    """With a span around every request, where a collector is named; the libraries are imported only then."""
    if not any(os.environ.get(name) for name in COLLECTOR) or os.environ.get("OTEL_TRACES_EXPORTER") == "none":
        return app
    if find_spec("opentelemetry") is None or find_spec("opentelemetry.exporter") is None:
        logger.warning("no traces are sent, since the extra 'otel' is not installed")
        return app
    from app.telemetry import tracing

    return tracing.Tracing(app, tracing.exporting())


def create_api(config: Settings, lifespan: Lifespan[FastAPI] | None = None) -> FastAPI:
    """The FastAPI application within: every route that the settings expose, and the schema of all."""
    api = FastAPI(
        title="Thirtytwo",
        version=__version__,
        description=DESCRIPTION,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        openapi_url="/openapi.json" if config.expose_docs else None,
        redirect_slashes=False,  # a redirect has neither a problem document nor the text that /v2 promises
    )
    api.include_router(routes.router)
    api.include_router(inference_router)
    for exposed, part in (
        (config.expose_docs, routes.docs_router),
        (config.expose_metrics, routes.metrics_router),
        (config.expose_page, routes.page_router),
    ):
        if exposed:
            api.include_router(part)
    api.mount("/static/swagger", routes.Files(directory=str(files(fastapi_offline) / "static")))
    api.mount("/static", routes.Files(directory=routes.ASSETS / "static"))
    problems.install(api)
    openapi.complete(api.openapi())
    return api


async def _predict(scope: Scope, receive: Receive) -> Response:
    return await predict.answer(scope, receive, scope["state"]["service"])


def _lifespan(
    config: Settings, metrics: Metrics, load_engine: LoadEngine, end: Callable[[int], None]
) -> Lifespan[FastAPI]:
    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[dict[str, Any]]:
        lifecycle, statistics = Lifecycle(), Statistics()
        file = weights.load(config.weights)
        threads = config.threads or max(1, available_cpus() // config.workers)
        runner = load_engine(file, config.device, threads, config.engine, config.precision)
        sizes = batch_sizes(config.max_batch)
        loaded, card = Classifier(file, runner, sizes), file.card
        keys = Keys([key.get_secret_value() for key in config.api_keys], config.api_keys_file)
        if keys.open:
            logger.warning("no API keys are set: everyone who reaches this address may use it")
        metrics.name_classes(loaded.classes)
        metrics.model_info.labels(card.name, file.version, runner.name, runner.device, runner.precision).set(1)

        def observe_pass(size: int, seconds: float) -> None:
            metrics.observe_batch(size, seconds)
            metrics.queue.set(batcher.waiting)
            statistics.observe_pass(size, seconds)

        batcher: Batcher[Pixels, NDArray[np.float32]] = Batcher(
            loaded.classify, sizes, config.max_queue, observe_pass, runner.lanes
        )
        with (
            ThreadPoolExecutor(2, "decode") as decoders,
            draining_signals(lifecycle, config.drain_s),
            ending_with_parent(),
        ):
            preprocessing.load_decoders()
            batcher.start()
            watchdog = asyncio.create_task(watch(batcher, lifecycle, config.watchdog_s))
            lifecycle.phase = Phase.READY
            sys.setswitchinterval(SWITCH_S)
            gc.freeze()  # what stands now stays: collections need not walk the libraries over and over
            yield {"service": State(config, lifecycle, metrics, keys, statistics, loaded, batcher, decoders)}
            watchdog.cancel()
            if lifecycle.phase is Phase.FAILED:
                end(1)
            lifecycle.phase = Phase.STOPPING
            batcher.close(config.drain_s)

    return lifespan
