"""`POST /predict`: read the upload, run the pipeline, render the predictions."""

from collections.abc import Callable, Coroutine, Mapping
from functools import partial
from typing import Any
from urllib.parse import parse_qsl

from fastapi import FastAPI, Request
from fastapi.routing import APIRoute
from pydantic_core import to_json
from starlette.middleware.errors import ServerErrorMiddleware
from starlette.middleware.exceptions import ExceptionMiddleware
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from app.api import openapi, problems, schemas, uploads
from app.api.inference import caller_of, classify, off_loop
from app.api.problems import TYPE
from app.api.uploads import Upload
from app.errors import InvalidParameter, RequestError
from app.inference.classifier import Classifier, ood_fields, top_classes
from app.inference.pipeline import Classification, Prediction
from app.state import State

DEFAULT_TOP_K = 3


class PredictRoute(APIRoute):
    """Calls the handler without FastAPI's dependency injection and response model, which cost 12 us a request."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        return predict


def install(api: FastAPI) -> None:
    """Adds the route to the application itself: an included router costs 5 us a request."""
    api.router.add_api_route(
        "/predict",
        predict,
        methods=["POST"],
        route_class_override=PredictRoute,
        tags=["Predictions"],
        summary="Classify images",
        response_model=schemas.Predictions,
        responses=openapi.PREDICT,
        openapi_extra=openapi.REQUEST,
    )


class FastPath:
    """Calls `predict` with the framework's error handling alone: the rest of its stack needs 0.4 ms of a lone request.

    The route of `install` has the schema and the errors of other methods.
    """

    def __init__(self, api: FastAPI) -> None:
        self.api = api
        (self._route,) = (route for route in api.routes if isinstance(route, PredictRoute))
        handled = ExceptionMiddleware(_respond, {RequestError: problems.on_request_error})
        self._predict = ServerErrorMiddleware(handled, problems.on_exception)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "POST" and self._matches(scope):
            scope["route"] = self._route
            await self._predict(scope, receive, send)
        else:
            await self.api(scope, receive, send)

    def _matches(self, scope: Scope) -> bool:
        path: str = scope["path"].removeprefix(scope.get("root_path", ""))
        return path == self._route.path


async def _respond(scope: Scope, receive: Receive, send: Send) -> None:
    response = await predict(Request(scope, receive, send))
    await response(scope, receive, send)


async def predict(request: Request) -> Response:
    """One or many images, as parts named `file` of a form or one as the raw body; results keep their order.

    A bad file among several has an `error` in its place. If every file is bad, the response is the first one's error.
    """
    scope, service = request.scope, request.state.service
    headers = dict(scope["headers"])
    caller = caller_of(scope, service.keys.check(headers))
    with service.lifecycle.admit():
        service.pipeline.check_capacity(1, caller.name)
        form, deadline = await uploads.read(request.receive, headers, service.settings, service.parse_thread)
        classifier = service.classifier  # may be another one for the next request
        top_k = _top_k(scope["query_string"], form.fields, len(classifier.classes))
        files = [upload.data for upload in form.files]
        classification = await classify(scope, request.receive, service, caller, classifier, files, deadline)
    errors = [outcome for outcome in classification.outcomes if isinstance(outcome, RequestError)]
    if len(errors) == len(classification.outcomes):
        raise errors[0]
    render = partial(_render, form.files, classification, top_k, classifier, service)
    content = await off_loop(render, len(form.files) * len(classifier.classes), service)
    return Response(content, media_type="application/json", headers={"Server-Timing": _server_timing(classification)})


def _top_k(query: bytes, fields: Mapping[str, str], classes: int) -> int:
    """The query parameter, or the form field of the same name; raises InvalidParameter."""
    values = [value for name, value in parse_qsl(query.decode("latin-1"), keep_blank_values=True) if name == "top_k"]
    text = values[-1] if values else fields.get("top_k", str(min(DEFAULT_TOP_K, classes)))
    if not (text.isascii() and text.isdecimal() and len(text) < 9 and 1 <= int(text) <= classes):
        raise InvalidParameter(f"top_k is {text[:20]!r}; it must be a whole number from 1 to {classes}.")
    return int(text)


def _server_timing(classification: Classification) -> str:
    _, _, decode_s, queue_s, inference_s = classification
    return f"decode;dur={decode_s * 1e3:.2f}, queue;dur={queue_s * 1e3:.2f}, model;dur={inference_s * 1e3:.2f}"


def _render(
    files: list[Upload], classification: Classification, top_k: int, classifier: Classifier, service: State
) -> bytes:
    """The contract's JSON, serialised file by file: no call holds the interpreter lock for long."""
    weights = classifier.weights
    predictions = [
        to_json(
            {"filename": file.filename, "error": _file_error(outcome, service)}
            if isinstance(outcome, RequestError)
            else {"filename": file.filename, **_prediction(outcome, top_k, weights.card.classes)}
        )
        for file, outcome in zip(files, classification.outcomes, strict=True)
    ]
    model = to_json({"name": weights.card.name, "version": weights.version})
    return b'{"model":%b,"predictions":[%b]}' % (model, b",".join(predictions))


def _prediction(prediction: Prediction, top_k: int, classes: list[str]) -> dict[str, Any]:
    top = top_classes(prediction.probabilities, top_k, classes)
    return {
        "label": top[0]["label"],
        "confidence": top[0]["probability"],
        "top": top,
        **ood_fields(prediction.ood),
        "resized_from": prediction.resized_from,
    }


def _file_error(error: RequestError, service: State) -> dict[str, str]:
    service.metrics.rejections.labels(error.type).inc()
    return {"type": TYPE + error.type, "title": error.title, "detail": str(error)}
