"""The composition root: settings in, an ASGI application out. Everything with a life is built in the lifespan."""

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from importlib.resources import files
from typing import Any

import fastapi_offline
import numpy as np
from fastapi import FastAPI
from numpy.typing import NDArray
from starlette.responses import Response
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Lifespan, Receive, Scope

from app import __version__, openapi, prediction, problems, settings
from app.batcher import Batcher, batch_sizes
from app.classifier import Classifier
from app.lifecycle import Lifecycle, Phase, draining_signals
from app.logs import AccessLog
from app.metrics import Metrics
from app.middleware import FastLane, RequestContext
from app.model import engine, weights
from app.model.engine import Engine
from app.model.images import Pixels
from app.model.weights import Weights
from app.routes import ASSETS, router
from app.settings import Settings
from app.state import State
from app.watchdog import watch

LoadEngine = Callable[[Weights, str, int, str, str], Engine]

DESCRIPTION = "Classifies small images. Send one or many, get labels with probabilities."


def create_app(
    config: Settings | None = None, load_engine: LoadEngine = engine.load, end: Callable[[int], None] = os._exit
) -> ASGIApp:
    """The application for these settings, or for those of the environment; raises SettingsError.

    `end` leaves the process with a status where the inference thread hangs, since that keeps a normal exit waiting.
    """
    config = config or settings.load()
    metrics = Metrics()
    api = create_api(_lifespan(config, metrics, load_engine, end))
    access = AccessLog(config.log_format) if config.log_level in ("debug", "info") else None
    return RequestContext(FastLane(api, f"{config.root_path}/predict", _predict, metrics), metrics, access)


def create_api(lifespan: Lifespan[FastAPI] | None = None) -> FastAPI:
    """The FastAPI application within: every route, and the schema of all."""
    api = FastAPI(
        title="Thirtytwo",
        version=__version__,
        description=DESCRIPTION,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
    )
    api.include_router(router)
    api.mount("/static/swagger", StaticFiles(directory=str(files(fastapi_offline) / "static")))
    api.mount("/static", StaticFiles(directory=ASSETS / "static"))
    problems.install(api)
    openapi.complete(api.openapi())
    return api


async def _predict(scope: Scope, receive: Receive) -> Response:
    return await prediction.answer(scope, receive, scope["state"]["service"])


def _lifespan(
    config: Settings, metrics: Metrics, load_engine: LoadEngine, end: Callable[[int], None]
) -> Lifespan[FastAPI]:
    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[dict[str, Any]]:
        lifecycle = Lifecycle()
        file = weights.load(config.weights)
        runner = load_engine(file, config.device, config.threads, config.engine, config.precision)
        sizes = batch_sizes(config.max_batch)
        loaded, card = Classifier(file, runner, sizes), file.card
        metrics.model_info.labels(card.name, file.version, runner.name, runner.device, runner.precision).set(1)
        batcher: Batcher[Pixels, NDArray[np.float32]] = Batcher(
            loaded.classify, sizes, config.max_queue, metrics.observe_batch
        )
        with ThreadPoolExecutor(2, "decode") as decoders, draining_signals(lifecycle, config.drain_s):
            batcher.start()
            watchdog = asyncio.create_task(watch(batcher, lifecycle, config.watchdog_s))
            lifecycle.phase = Phase.READY
            yield {"service": State(config, lifecycle, metrics, loaded, batcher, decoders)}
            watchdog.cancel()
            if lifecycle.phase is Phase.FAILED:
                end(1)
            lifecycle.phase = Phase.STOPPING
            batcher.close(config.drain_s)

    return lifespan
