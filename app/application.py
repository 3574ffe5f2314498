"""The composition root: settings in, an ASGI application out. `lifespan` builds what has to be started and stopped."""

import logging
import os
from collections.abc import Callable
from importlib.resources import files
from importlib.util import find_spec
from socket import socket

import fastapi_offline
from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Lifespan

from app import __version__, settings
from app.api import openapi, predict, problems, routes
from app.api.addressing import RootPath, TrustedHosts
from app.api.middleware import RequestContext
from app.lifespan import lifespan
from app.oip.routes import router as inference_router
from app.settings import Settings
from app.sources import LoadEngine, load_engine
from app.telemetry import log_stream
from app.telemetry.logs import AccessLog
from app.telemetry.metrics import Metrics

logger = logging.getLogger(__name__)

COLLECTOR = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")  # OpenTelemetry's own names
CORS_METHODS = ["GET", "HEAD", "POST"]
CORS_EXPOSED_HEADERS = ["RateLimit", "RateLimit-Policy", "Retry-After", "Server-Timing", "X-Request-ID"]
DESCRIPTION = "Classifies small images. Send one or many, get labels with probabilities."


def create_app(
    config: Settings | None = None,
    load_engine: LoadEngine = load_engine,
    exit_process: Callable[[int], None] = log_stream.exit_process,
    link: socket | None = None,
) -> ASGIApp:
    """The application for these settings, or for those of the environment; raises SettingsError.

    `link` is a front end's connection to the engine process, which then runs the model. `exit_process` ends the process
    with a status after a failure: a stalled inference thread blocks a normal exit.
    """
    config = config or settings.load()
    metrics = Metrics()
    log_stream.stderr().on_drop(metrics.log_lines_dropped.inc)
    app: ASGIApp = predict.FastPath(create_api(config, lifespan(config, metrics, load_engine, exit_process, link)))
    if config.cors_origins:
        app = CORSMiddleware(app, config.cors_origins, CORS_METHODS, ["*"], expose_headers=CORS_EXPOSED_HEADERS)
    if config.allowed_hosts:
        app = TrustedHosts(app, config.allowed_hosts)
    access = AccessLog(config.log_format) if config.log_level in ("debug", "info") else None
    app = _traced(RequestContext(app, metrics, access, config.max_inflight_bytes))
    return RootPath(app, config.root_path) if config.root_path else app


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
    predict.install(api)
    api.include_router(routes.router)
    api.include_router(inference_router)
    for exposed, part in (
        (config.expose_docs, routes.docs_router),
        (config.expose_metrics, routes.metrics_router),
        (config.expose_ui, routes.page_router),
    ):
        if exposed:
            api.include_router(part)
    api.mount("/static/swagger", routes.Files(directory=str(files(fastapi_offline) / "static")))
    api.mount("/static", routes.Files(directory=routes.ASSETS / "static"))
    problems.install(api)
    openapi.complete(api.openapi())
    return api
