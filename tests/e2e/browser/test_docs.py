"""The OpenAPI page: "Try it out" and "Authorize"."""

import json
from collections.abc import Callable

import httpx
import pytest
from playwright.sync_api import Page

from app.api import openapi
from tests.conftest import EXAMPLES
from tests.e2e.browser.conftest import Watch
from tests.support.swagger import choose, execute, open_predict

Visit = Callable[..., tuple[Page, Watch]]
Start = Callable[..., httpx.Client]


@pytest.mark.parametrize("names", [["cat.png"], ["cat.png", "frog.png"], ["ship.jpg", "chelsea.png", "cat.png"]])
def test_try_it_out_sends_a_form(visit: Visit, client: httpx.Client, names: list[str]) -> None:
    page, watch = visit(client, "/docs")
    open_predict(page)
    for i, name in enumerate(names):
        if i:
            page.get_by_role("button", name="Add string item").click()
        choose(page, i, EXAMPLES / name)
    answer = execute(page, 200)
    sent = [("file", (name, (EXAMPLES / name).read_bytes())) for name in names]
    assert answer == client.post("/predict", files=sent).json()
    assert watch.asked("POST") == 1


def test_try_it_out_sends_a_raw_body(visit: Visit, client: httpx.Client) -> None:
    page, _ = visit(client, "/docs")
    open_predict(page)
    page.get_by_label("Request content type").select_option("image/png")
    choose(page, 0, EXAMPLES / "cat.png")
    (prediction,) = execute(page, 200)["predictions"]
    assert prediction["filename"] is None


@pytest.mark.parametrize("scheme", ["Bearer", "X-API-Key"])
def test_authorize_sends_the_api_key(visit: Visit, start: Start, scheme: str) -> None:
    page, watch = visit(start(api_keys="secret"), "/docs")
    watch.expected = {401}
    open_predict(page)
    choose(page, 0, EXAMPLES / "cat.png")
    assert execute(page, 401)["title"] == "An API key is needed"
    page.locator("button.authorize").click()
    form = page.locator(".auth-container").filter(has=page.get_by_role("heading", name=scheme))
    form.locator("input").fill("secret")
    form.get_by_role("button", name="Apply credentials").click()
    page.locator("button.close-modal").click()
    assert "predictions" in execute(page, 200)


def test_every_status_has_a_description_and_an_example(visit: Visit, client: httpx.Client) -> None:
    page, _ = visit(client, "/docs")
    open_predict(page)
    rows = page.locator(".responses-table:not(.live-responses-table) tr.response")
    statuses = rows.locator(".response-col_status").all_inner_texts()
    assert sorted(statuses) == sorted(str(status) for status in openapi.PREDICT)
    for status, row in zip(statuses, rows.all(), strict=True):
        example = json.loads(row.locator(".highlight-code code").inner_text())
        assert example.get("status") == (None if status == "200" else int(status))
        assert row.locator(".response-col_description .renderedMarkdown").first.inner_text()
