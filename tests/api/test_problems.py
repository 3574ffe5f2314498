"""Errors are problem documents, and the Open Inference Protocol's own form under /v2."""

import asyncio
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI
from starlette.staticfiles import StaticFiles

from app.api import problems
from app.api.middleware import RequestContext
from app.errors import QueueFull
from app.telemetry.metrics import Metrics

STATUSES = {"/full": 429, "/fails": 500, "/number/x": 422, "/nothing": 404, "/full/": 404}


async def full() -> None:
    raise QueueFull("no room", retry_after_s=7)


async def fails() -> None:
    raise RuntimeError("a secret")


async def number(number: int) -> None:
    pass


def ask(path: str, folder: Path, root_path: str = "", method: str = "GET") -> httpx.Response:
    api = FastAPI(redirect_slashes=False)
    problems.install(api)
    for prefix in ("", "/v2"):
        api.add_api_route(prefix + "/full", full)
        api.add_api_route(prefix + "/fails", fails)
        api.add_api_route(prefix + "/number/{number}", number)
    api.mount("/static", StaticFiles(directory=folder))

    async def main() -> httpx.Response:
        app = RequestContext(api, Metrics(), None)
        transport = httpx.ASGITransport(app, raise_app_exceptions=False, root_path=root_path)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.request(method, root_path + path)

    return asyncio.run(main())


@pytest.mark.parametrize("root_path", ["", "/classifier", "/v2"])
@pytest.mark.parametrize(("path", "status"), STATUSES.items())
def test_the_form_of_an_error(path: str, status: int, root_path: str, tmp_path: Path) -> None:
    problem = ask(path, tmp_path, root_path)
    assert problem.status_code == status
    assert problem.headers["content-type"] == problems.MEDIA_TYPE
    assert set(problem.json()) == {"type", "title", "status", "detail", "request_id"}
    error = ask("/v2" + path, tmp_path, root_path)
    assert error.status_code == status
    assert error.headers["content-type"] == "application/json"
    assert set(error.json()) == {"error"}
    assert "secret" not in problem.text + error.text
    assert problem.headers.get("retry-after") == error.headers.get("retry-after") == ("7" if status == 429 else None)


def test_a_wrong_method(tmp_path: Path) -> None:
    error = ask("/v2/full", tmp_path, method="PUT")
    assert (error.status_code, error.headers["allow"]) == (405, "GET, HEAD")
    assert error.json() == {"error": "Method Not Allowed: PUT /v2/full"}


def test_an_unexpected_error_names_the_request_in_the_log(tmp_path: Path) -> None:
    error = ask("/v2/fails", tmp_path)
    assert error.headers["x-request-id"] in error.json()["error"]


@pytest.mark.parametrize("path", ["/v2x", "/static/v2/nothing", "/x/v2"])
def test_only_the_protocols_own_paths_have_its_form(path: str, tmp_path: Path) -> None:
    assert ask(path, tmp_path, "/classifier").headers["content-type"] == problems.MEDIA_TYPE
