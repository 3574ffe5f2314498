"""The GET endpoints and the static files."""

from pathlib import Path

from fastapi import APIRouter
from fastapi.responses import FileResponse, PlainTextResponse, Response
from starlette.staticfiles import StaticFiles
from starlette.types import Receive, Scope, Send

from app.api import openapi, schemas
from app.state import Service
from app.telemetry import metrics

ASSETS = Path(__file__).parents[1] / "assets"
OWN_FILES_ONLY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
)
NO_HTML_FROM_TEXT = "require-trusted-types-for 'script'; trusted-types 'none'; "
INDEX_HEADERS = {"Content-Security-Policy": OWN_FILES_ONLY + NO_HTML_FROM_TEXT + "img-src 'self' blob:"}
DOCS_HEADERS = {"Content-Security-Policy": OWN_FILES_ONLY + "img-src 'self' data:"}  # data: in Swagger UI's own style


class Files(StaticFiles):
    """Static files, with one route name in metrics and log."""

    path = "/static/{path}"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope["route"] = self
        await super().__call__(scope, receive, send)


router, docs_router, metrics_router, page_router = (APIRouter() for _ in range(4))


@router.get("/model", tags=["Model"], summary="The model's card")
async def model(service: Service) -> schemas.ModelCard:
    shadow = service.pipeline.shadow
    return schemas.ModelCard(**service.classifier.card(), shadow=shadow.report() if shadow else None)


@router.get("/healthz", tags=["Operation"], summary="Alive", responses={503: openapi.ERRORS[503]})
async def healthz(service: Service) -> schemas.Health:
    service.lifecycle.check_alive()
    return schemas.Health(status="alive")


@router.get("/readyz", tags=["Operation"], summary="Ready for work", responses={503: openapi.ERRORS[503]})
async def readyz(service: Service) -> schemas.Health:
    service.lifecycle.check_ready()
    return schemas.Health(status="ready")


@metrics_router.get("/metrics", tags=["Operation"], summary="Prometheus metrics", response_class=PlainTextResponse)
async def read_metrics(service: Service) -> Response:
    service.metrics.queue.set(service.pipeline.batcher.queue.size)
    return Response(service.metrics.render(), media_type=metrics.CONTENT_TYPE)


@page_router.get("/", include_in_schema=False)
async def index() -> FileResponse:
    return FileResponse(ASSETS / "index.html", headers=INDEX_HEADERS)


@docs_router.get("/docs", include_in_schema=False)
async def docs() -> FileResponse:
    return FileResponse(ASSETS / "docs.html", headers=DOCS_HEADERS)
