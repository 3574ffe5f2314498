"""Chromium, restricted to loopback. A test fails if a page logs an error or requests another host."""

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, BrowserContext, ConsoleMessage, Page, Request, Route, expect, sync_playwright

CHROMIUM = os.environ.get("CHROMIUM", "/usr/bin/chromium")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
]
LOCAL = re.compile(r"(http://127\.0\.0\.1:\d+/|blob:http://127\.0\.0\.1:\d+/|data:)")
TIMEOUT_MS = 60_000

expect.set_options(timeout=TIMEOUT_MS)


class Watch:
    """Requests and console errors of a browser context. Statuses in `expected` are no errors."""

    def __init__(self, context: BrowserContext) -> None:
        self.requests: list[str] = []
        self.outside: list[str] = []
        self.complaints: list[str] = []
        self.expected: set[int] = set()
        context.on("request", self._request)
        context.on("console", self._console)
        context.on("weberror", lambda error: self.complaints.append(str(error.error)))
        context.route(lambda url: not LOCAL.match(url), self._refuse)

    def asked(self, path: str) -> int:
        return sum(path in url for url in self.requests)

    def check(self) -> None:
        assert self.outside == []
        provoked = tuple(f"Failed to load resource: the server responded with a status of {s} " for s in self.expected)
        assert [text for text in self.complaints if not text.startswith(provoked)] == []

    def _request(self, request: Request) -> None:
        self.requests.append(f"{request.method} {request.url}")
        if not LOCAL.match(request.url):
            self.outside.append(request.url)

    def _refuse(self, route: Route) -> None:
        route.abort()

    def _console(self, message: ConsoleMessage) -> None:
        if message.type == "error":
            self.complaints.append(message.text)


@pytest.fixture(scope="package")
def browser() -> Iterator[Browser]:
    if not Path(CHROMIUM).exists():
        pytest.fail(f"The browser tests need Chromium at {CHROMIUM}: apt-get install chromium", pytrace=False)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def visit(browser: Browser) -> Iterator[Callable[..., tuple[Page, Watch]]]:
    """Opens a page in its own browser context; afterwards the test fails on unexpected errors and requests."""
    opened: list[tuple[BrowserContext, Watch]] = []

    def visit_page(client: httpx.Client | str, path: str = "/", **options: object) -> tuple[Page, Watch]:
        base = client if isinstance(client, str) else str(client.base_url)
        defaults = {"viewport": {"width": 1100, "height": 800}, "reduced_motion": "reduce"}
        context = browser.new_context(**{**defaults, **options})
        context.set_default_timeout(TIMEOUT_MS)
        watch = Watch(context)
        opened.append((context, watch))
        page = context.new_page()
        page.on("filechooser", lambda _: None)  # from the start, or a key press can outrun the interception
        page.goto(base.rstrip("/") + path)
        return page, watch

    yield visit_page
    for context, watch in opened:
        context.close()
        watch.check()


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    path = tmp_path / "notes.txt"
    path.write_text("no image")
    return path


def check_accessible(page: Page) -> None:
    results = Axe().run(page)
    assert results.violations_count == 0, results.generate_report()
