"""The endpoints. Each translates: it parses, calls one thing and shapes the answer."""

import asyncio
import json
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, Query, Request
from fastapi.responses import FileResponse, PlainTextResponse, Response
from numpy.typing import NDArray

from app import auth, metrics, openapi, schemas, uploads
from app.batcher import Answer
from app.errors import InvalidParameter, NotReady, RequestError
from app.lifecycle import Phase
from app.model import images
from app.model.images import Picture, Pixels
from app.problems import TYPE
from app.state import Service, State
from app.uploads import Upload

ASSETS = Path(__file__).parent / "assets"
OWN_FILES_ONLY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
)
NO_HTML_FROM_TEXT = "require-trusted-types-for 'script'; trusted-types 'none'; "
INDEX_HEADERS = {"Content-Security-Policy": OWN_FILES_ONLY + NO_HTML_FROM_TEXT + "img-src 'self' blob:"}
DOCS_HEADERS = {"Content-Security-Policy": OWN_FILES_ONLY + "img-src 'self' data:"}  # data: in Swagger UI's own style

router = APIRouter()

Outcome = Picture | RequestError
TopK = Annotated[int, Query(description="How many of the likeliest classes to tell, from 1 to all of them.")]


@router.post(
    "/predict",
    tags=["Predictions"],
    summary="Classify images",
    response_model=schemas.Predictions,
    responses=openapi.PREDICT,
    openapi_extra={"requestBody": openapi.BODY},
    dependencies=[auth.Authorized],
)
async def predict(request: Request, service: Service, top_k: TopK = 3) -> Response:
    """One or many images, as parts named `file` of a form or one as the raw body; answers keep their order.

    A bad file among several has an `error` in its place. When every file is bad, the answer is the first one's error.
    """
    if not 1 <= top_k <= len(service.classifier.classes):
        raise InvalidParameter(f"top_k is {top_k}; it must be from 1 to {len(service.classifier.classes)}.")
    if service.lifecycle.phase is not Phase.READY:
        raise NotReady("The service is shutting down.", retry_after_s=1)
    with service.lifecycle.accepted():
        files = await uploads.read(request, service.settings)
        begun = time.perf_counter()
        outcomes = await _decode(files, service)
        decode_s = time.perf_counter() - begun
        answer = await _classify(request, outcomes, service)
    service.metrics.decode.observe(decode_s)
    service.metrics.queue_wait.observe(answer.queue_s)
    timing = (
        f"decode;dur={decode_s * 1e3:.2f}, queue;dur={answer.queue_s * 1e3:.2f}, model;dur={answer.run_s * 1e3:.2f}"
    )
    body = _shape(files, outcomes, answer.results, top_k, service)
    return Response(json.dumps(body), media_type="application/json", headers={"Server-Timing": timing})


async def _decode(files: list[Upload], service: State) -> list[Outcome]:
    """Each file's picture or what is wrong with it; raises the first error when there is no picture at all."""
    settings, size = service.settings, service.classifier.input_size

    def decode_all() -> list[Outcome]:
        outcomes: list[Outcome] = []
        for file in files:
            try:
                if file.error is not None:
                    raise file.error
                outcomes.append(images.decode(file.data, size, settings.max_pixels, settings.strict_size))
            except RequestError as error:
                outcomes.append(error)
        return outcomes

    outcomes = await asyncio.get_running_loop().run_in_executor(service.decoders, decode_all)
    errors = [outcome for outcome in outcomes if isinstance(outcome, RequestError)]
    for error in errors:
        service.metrics.refusals.labels(error.type).inc()
    if len(errors) == len(outcomes):
        raise errors[0]
    return outcomes


async def _classify(request: Request, outcomes: list[Outcome], service: State) -> Answer[NDArray[np.float32]]:
    """Probabilities of the decoded pictures; the wait ends when the caller goes away."""
    pixels: list[Pixels] = [outcome.pixels for outcome in outcomes if isinstance(outcome, Picture)]
    wait = asyncio.create_task(service.batcher.submit(pixels, service.settings.request_timeout_s))
    gone = asyncio.create_task(_disconnected(request))
    try:
        await asyncio.wait((wait, gone), return_when=asyncio.FIRST_COMPLETED)
        return await wait if wait.done() else await _cancel(wait)
    finally:
        gone.cancel()
        wait.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _cancel(wait: "asyncio.Task[Answer[NDArray[np.float32]]]") -> Answer[NDArray[np.float32]]:
    wait.cancel()
    return await wait


def _shape(
    files: list[Upload], outcomes: list[Outcome], results: list[NDArray[np.float32]], top_k: int, service: State
) -> dict[str, Any]:
    rows = iter(results)
    predictions = [
        {"filename": file.filename, "error": _file_error(outcome)}
        if isinstance(outcome, RequestError)
        else _prediction(file.filename, outcome, next(rows), top_k, service)
        for file, outcome in zip(files, outcomes, strict=True)
    ]
    weights = service.classifier.weights
    return {"model": {"name": weights.card.name, "version": weights.version}, "predictions": predictions}


def _prediction(
    filename: str | None, picture: Picture, probabilities: NDArray[np.float32], top_k: int, service: State
) -> dict[str, Any]:
    classes = service.classifier.classes
    best = np.argsort(-probabilities, kind="stable")[:top_k].tolist()
    top = [{"label": classes[i], "probability": round(float(probabilities[i]), 4)} for i in best]
    service.metrics.predictions.labels(top[0]["label"]).inc()
    return {
        "filename": filename,
        "label": top[0]["label"],
        "confidence": top[0]["probability"],
        "top": top,
        "resized_from": picture.resized_from,
    }


def _file_error(error: RequestError) -> dict[str, str]:
    return {"type": TYPE + error.type, "title": error.title, "detail": str(error)}


@router.get("/model", tags=["Model"], summary="The model's card")
async def model(service: Service) -> schemas.ModelCard:
    return schemas.ModelCard(**service.classifier.card())


@router.get("/healthz", tags=["Operation"], summary="Alive")
async def healthz() -> schemas.Health:
    return schemas.Health(status="alive")


@router.get("/readyz", tags=["Operation"], summary="Ready for work", responses={503: openapi.ERRORS[503]})
async def readyz(service: Service) -> schemas.Health:
    if service.lifecycle.phase is not Phase.READY:
        raise NotReady(f"The service is {service.lifecycle.phase.value}.", retry_after_s=1)
    return schemas.Health(status="ready")


@router.get("/metrics", tags=["Operation"], summary="Prometheus metrics", response_class=PlainTextResponse)
async def read_metrics(service: Service) -> Response:
    service.metrics.queue.set(service.batcher.waiting)
    return Response(service.metrics.render(), media_type=metrics.CONTENT_TYPE)


@router.get("/", include_in_schema=False)
async def index() -> FileResponse:
    return FileResponse(ASSETS / "index.html", headers=INDEX_HEADERS)


@router.get("/docs", include_in_schema=False)
async def docs() -> FileResponse:
    return FileResponse(ASSETS / "docs.html", headers=DOCS_HEADERS)
