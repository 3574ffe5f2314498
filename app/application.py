"""The composition root: settings in, a FastAPI application out. Everything with a life is built in the lifespan."""

from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from importlib.resources import files
from typing import Any

import fastapi_offline
import numpy as np
from fastapi import FastAPI
from numpy.typing import NDArray
from starlette.staticfiles import StaticFiles

from app import __version__, classifier, problems, settings
from app.batcher import Batcher
from app.lifecycle import Lifecycle, Phase, draining_signals
from app.metrics import Metrics
from app.middleware import RequestContext
from app.model import weights
from app.model.images import Pixels
from app.routes import ASSETS, router
from app.schemas import Problem
from app.settings import Settings
from app.state import State

DESCRIPTION = "Classifies small images. Send one or many, get labels with probabilities."


def create_app(config: Settings | None = None) -> FastAPI:
    """The application for these settings, or for those of the environment; raises SettingsError."""
    config = config or settings.load()
    metrics = Metrics()
    app = FastAPI(
        title="Thirtytwo",
        version=__version__,
        description=DESCRIPTION,
        lifespan=_lifespan(config, metrics),
        docs_url=None,
        redoc_url=None,
    )
    app.include_router(router)
    app.mount("/static/swagger", StaticFiles(directory=str(files(fastapi_offline) / "static")))
    app.mount("/static", StaticFiles(directory=ASSETS / "static"))
    app.add_middleware(RequestContext, metrics=metrics)
    problems.install(app)
    app.openapi = lambda: _openapi(app, original)  # type: ignore[method-assign]
    original = FastAPI.openapi
    return app


def _openapi(app: FastAPI, original: Any) -> dict[str, Any]:
    """FastAPI's schema with the problem document, which only our own renderer uses."""
    schema: dict[str, Any] = original(app)
    schema["components"]["schemas"]["Problem"] = Problem.model_json_schema()
    return schema


def _lifespan(config: Settings, metrics: Metrics) -> Any:
    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[dict[str, Any]]:
        lifecycle = Lifecycle()
        loaded = classifier.load(weights.load(config.weights), config.device, config.threads, config.max_batch)
        engine, card = loaded.engine, loaded.weights.card
        metrics.model_info.labels(card.name, loaded.weights.version, engine.name, engine.device, engine.precision).set(
            1
        )
        batcher: Batcher[Pixels, NDArray[np.float32]] = Batcher(
            loaded.classify, config.max_batch, config.max_queue, metrics.observe_batch
        )
        with ThreadPoolExecutor(2, "decode") as decoders, draining_signals(lifecycle, config.drain_s):
            batcher.start()
            lifecycle.phase = Phase.READY
            yield {"service": State(config, lifecycle, metrics, loaded, batcher, decoders)}
            lifecycle.phase = Phase.STOPPING
            batcher.close(config.drain_s)

    return lifespan
