"""Steps on the OpenAPI page (Swagger UI)."""

import json
from pathlib import Path

from playwright.sync_api import Page, expect


def choose(page: Page, nth: int, file: Path) -> None:
    """Sets the file of the n-th file input."""
    with page.expect_file_chooser() as chooser:
        page.locator("#swagger-ui input[type=file]").nth(nth).click()
    chooser.value.set_files(file)


def execute(page: Page, status: int) -> dict[str, object]:
    """Sends the request and returns the JSON of its response, which has this status."""
    page.get_by_role("button", name="Execute").click()
    expect(page.locator(".live-responses-table .response-col_status").last).to_contain_text(str(status))
    body: dict[str, object] = json.loads(page.locator(".live-responses-table .highlight-code code").first.inner_text())
    return body


def open_predict(page: Page) -> None:
    page.get_by_role("button", name="/predict").first.click()
    expect(page.locator("#swagger-ui input[type=file]")).to_have_count(1)
