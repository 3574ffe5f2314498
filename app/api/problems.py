"""The one place where errors become answers: application/problem+json (RFC 9457), under /v2 the protocol's own form."""

from http import HTTPStatus

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic_core import to_json
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response
from starlette.types import Scope

from app.errors import ClientDisconnected, InvalidParameter, NotReady, RequestError, Unauthorized

MEDIA_TYPE = "application/problem+json"
TYPE = "urn:thirtytwo:problem:"
INFERENCE = "/v2"  # prefix of the Open Inference Protocol


def problem(scope: Scope, status: int, slug: str, title: str, detail: str) -> Response:
    if _is_inference_path(scope):
        return JSONResponse({"error": detail}, status)
    request_id = scope["state"]["request_id"]
    body = {"type": TYPE + slug, "title": title, "status": status, "detail": detail, "request_id": request_id}
    return Response(to_json(body), status, media_type=MEDIA_TYPE)


def _is_inference_path(scope: Scope) -> bool:
    root_path = scope.get("app_root_path", scope.get("root_path", ""))  # a mount has put its own path into the second
    path: str = scope["path"].removeprefix(root_path)
    return path == INFERENCE or path.startswith(f"{INFERENCE}/")


def of_error(error: RequestError, scope: Scope) -> Response:
    response = problem(scope, error.status, error.type, error.title, str(error))
    if error.retry_after_s is not None:
        response.headers["Retry-After"] = str(error.retry_after_s)
    if isinstance(error, NotReady):
        response.headers["Connection"] = "close"  # so that the caller finds another instance
    if isinstance(error, Unauthorized):
        response.headers["WWW-Authenticate"] = "Bearer"
    return response


def internal(scope: Scope) -> Response:
    detail = f"Something went wrong here. The log has the details under the request id {scope['state']['request_id']}."
    return problem(scope, 500, "internal", "Internal error", detail)


async def on_request_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    if request.method == "POST" and not isinstance(error, ClientDisconnected):  # a probe's 503 is no rejection
        request.state.service.metrics.rejections.labels(error.type).inc()
    return of_error(error, request.scope)


async def on_validation_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    where = " ".join(str(part) for part in first["loc"])
    return of_error(InvalidParameter(f"{where}: {first['msg']}"), request.scope)


async def on_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    title = HTTPStatus(error.status_code).phrase
    slug = title.lower().replace(" ", "-")
    detail = error.detail if error.detail != title else f"{title}: {request.method} {request.url.path}"
    response = problem(request.scope, error.status_code, slug, title, detail)
    response.headers.update(error.headers or {})
    if response.headers.get("Allow") == "GET":
        response.headers["Allow"] = "GET, HEAD"  # which app.api.middleware serves as GET
    return response


async def on_exception(request: Request, error: Exception) -> Response:
    return internal(request.scope)


def install(app: FastAPI) -> None:
    app.add_exception_handler(RequestError, on_request_error)
    app.add_exception_handler(RequestValidationError, on_validation_error)
    app.add_exception_handler(HTTPException, on_http_exception)
    app.add_exception_handler(Exception, on_exception)
