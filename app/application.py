"""The composition root: settings in, an ASGI application out. Everything with a life is built in the lifespan."""

from collections.abc import AsyncIterator
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
from starlette.types import ASGIApp, Receive, Scope

from app import __version__, openapi, prediction, problems, settings
from app.batcher import Batcher, batch_sizes
from app.classifier import Classifier
from app.lifecycle import Lifecycle, Phase, draining_signals
from app.metrics import Metrics
from app.middleware import FastLane, RequestContext
from app.model import engine, weights
from app.model.images import Pixels
from app.oip.routes import router as inference_router
from app.oip.statistics import Statistics
from app.routes import ASSETS, router
from app.settings import Settings
from app.state import State

DESCRIPTION = "Classifies small images. Send one or many, get labels with probabilities."


def create_app(config: Settings | None = None) -> ASGIApp:
    """The application for these settings, or for those of the environment; raises SettingsError."""
    config = config or settings.load()
    metrics = Metrics()
    api = create_api(config, metrics)
    return RequestContext(FastLane(api, f"{config.root_path}/predict", _predict), metrics)


def create_api(config: Settings, metrics: Metrics) -> FastAPI:
    """The FastAPI application within: every route, and the schema of all."""
    api = FastAPI(
        title="Thirtytwo",
        version=__version__,
        description=DESCRIPTION,
        lifespan=_lifespan(config, metrics),
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,  # a redirect has neither a problem document nor the text that /v2 promises
    )
    api.include_router(router)
    api.include_router(inference_router)
    api.mount("/static/swagger", StaticFiles(directory=str(files(fastapi_offline) / "static")))
    api.mount("/static", StaticFiles(directory=ASSETS / "static"))
    problems.install(api)
    openapi.complete(api.openapi())
    return api


async def _predict(scope: Scope, receive: Receive) -> Response:
    return await prediction.answer(scope, receive, scope["state"]["service"])


def _lifespan(config: Settings, metrics: Metrics) -> Any:
    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[dict[str, Any]]:
        lifecycle, statistics = Lifecycle(), Statistics()
        file = weights.load(config.weights)
        runner = engine.load(file, config.device, config.threads, config.engine, config.precision)
        sizes = batch_sizes(config.max_batch)
        loaded, card = Classifier(file, runner, sizes), file.card
        metrics.model_info.labels(card.name, file.version, runner.name, runner.device, runner.precision).set(1)

        def observe_pass(size: int, seconds: float) -> None:
            metrics.observe_batch(size, seconds)
            statistics.observe_pass(size, seconds)

        batcher: Batcher[Pixels, NDArray[np.float32]] = Batcher(loaded.classify, sizes, config.max_queue, observe_pass)
        with ThreadPoolExecutor(2, "decode") as decoders, draining_signals(lifecycle, config.drain_s):
            batcher.start()
            lifecycle.phase = Phase.READY
            yield {"service": State(config, lifecycle, metrics, statistics, loaded, batcher, decoders)}
            lifecycle.phase = Phase.STOPPING
            batcher.close(config.drain_s)

    return lifespan
