"""The endpoints. Each translates: it parses, calls one thing and shapes the answer."""

from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import FileResponse, HTMLResponse, Response

from app import metrics, prediction, schemas
from app.errors import NotReady
from app.lifecycle import Phase
from app.model import images
from app.problems import MEDIA_TYPE
from app.state import Service

ASSETS = Path(__file__).parent / "assets"

router = APIRouter()

BINARY = {"schema": {"type": "string", "format": "binary"}}
FORM = {
    "type": "object",
    "required": ["file"],
    "properties": {
        "file": {
            "type": "array",
            "items": {"type": "string", "format": "binary"},
            "description": "one or many images",
        }
    },
}
PREDICT: dict[str, Any] = {
    "parameters": [
        {
            "name": "top_k",
            "in": "query",
            "description": "labels for each image, from 1 to the number of classes",
            "schema": {"type": "integer", "minimum": 1, "default": 3},
        }
    ],
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {"schema": FORM},
            **dict.fromkeys(images.FORMATS.values(), BINARY),
            "application/octet-stream": BINARY,
        },
    },
    "security": [{}, {"Bearer": []}, {"ApiKey": []}],
}
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"description": text, "content": {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}}}
    for status, text in {
        400: "Malformed form, no part named `file`, or an empty body.",
        401: "API keys are set, and none or a wrong one came.",
        413: "Too many bytes, files or pixels.",
        415: "Not PNG, JPEG, WebP, BMP or GIF.",
        422: "The image is broken, of a wrong size under STRICT_SIZE, or `top_k` is out of range.",
        429: "The queue is full; `Retry-After` says when there will be room.",
        503: "Not ready yet, or shutting down.",
        504: "Not answered within the request timeout.",
    }.items()
}


@router.post(
    "/predict",
    summary="Classify images",
    response_model=schemas.Predictions,
    responses=ERRORS,
    openapi_extra=PREDICT,
)
async def predict(request: Request, service: Service) -> Response:
    """One or many images, as parts named `file` of a form or one as the raw body; answers keep their order.

    A bad file among several has an `error` in its place. When every file is bad, the answer is the first one's error.
    """
    return await prediction.answer(request.scope, request.receive, service)


@router.get("/model", summary="The model's card")
async def model(service: Service) -> schemas.ModelCard:
    return schemas.ModelCard(**service.classifier.card())


@router.get("/healthz", summary="Alive")
async def healthz() -> schemas.Health:
    return schemas.Health(status="alive")


@router.get("/readyz", summary="Ready for work", responses={503: ERRORS[503]})
async def readyz(service: Service) -> schemas.Health:
    if service.lifecycle.phase is not Phase.READY:
        raise NotReady(f"The service is {service.lifecycle.phase.value}.", retry_after_s=1)
    return schemas.Health(status="ready")


@router.get("/metrics", summary="Prometheus metrics", response_class=Response)
async def read_metrics(service: Service) -> Response:
    service.metrics.queue.set(service.batcher.waiting)
    return Response(service.metrics.render(), media_type=metrics.CONTENT_TYPE)


@router.get("/", include_in_schema=False)
async def index() -> FileResponse:
    return FileResponse(ASSETS / "index.html")


@router.get("/docs", include_in_schema=False)
async def docs() -> HTMLResponse:
    return HTMLResponse((ASSETS / "docs.html").read_text())
