"""The one place where errors become application/problem+json (RFC 9457)."""

import json
from http import HTTPStatus

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from app.errors import InvalidParameter, NotReady, RequestError, Unauthorized

MEDIA_TYPE = "application/problem+json"
TYPE = "urn:thirtytwo:problem:"


def problem(status: int, slug: str, title: str, detail: str, request_id: str) -> Response:
    body = {"type": TYPE + slug, "title": title, "status": status, "detail": detail, "request_id": request_id}
    return Response(json.dumps(body), status, media_type=MEDIA_TYPE)


def of_error(error: RequestError, request_id: str) -> Response:
    response = problem(error.status, error.type, error.title, str(error), request_id)
    if error.retry_after_s is not None:
        response.headers["Retry-After"] = str(error.retry_after_s)
    if isinstance(error, NotReady):
        response.headers["Connection"] = "close"  # so that the caller finds another instance
    if isinstance(error, Unauthorized):
        response.headers["WWW-Authenticate"] = "Bearer"
    return response


def internal(request_id: str) -> Response:
    detail = "Something went wrong here. The log has the details under this request id."
    return problem(500, "internal", "Internal error", detail, request_id)


async def on_request_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    return of_error(error, request.state.request_id)


async def on_validation_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    where = " ".join(str(part) for part in first["loc"])
    return of_error(InvalidParameter(f"{where}: {first['msg']}"), request.state.request_id)


async def on_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    title = HTTPStatus(error.status_code).phrase
    slug = title.lower().replace(" ", "-")
    response = problem(error.status_code, slug, title, f"{request.method} {request.url.path}", request.state.request_id)
    response.headers.update(error.headers or {})
    return response


def install(app: FastAPI) -> None:
    app.add_exception_handler(RequestError, on_request_error)
    app.add_exception_handler(RequestValidationError, on_validation_error)
    app.add_exception_handler(HTTPException, on_http_exception)
