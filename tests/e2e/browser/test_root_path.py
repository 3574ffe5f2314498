"""The pages behind a reverse proxy that strips a path prefix."""

import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest
from playwright.sync_api import Page, expect

from tests.conftest import EXAMPLES
from tests.e2e.browser.conftest import Watch
from tests.support.swagger import choose, execute, open_predict

Visit = Callable[..., tuple[Page, Watch]]

PREFIX = "/pictures/classifier"


@pytest.fixture(scope="module")
def behind_a_proxy(start: Callable[..., httpx.Client]) -> Iterator[str]:
    service = start(root_path=PREFIX)

    class Proxy(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if not self.path.startswith(PREFIX + "/"):
                self.send_error(404)
                return
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
            sent = {name: value for name, value in self.headers.items() if name.lower() != "host"}
            answer = service.request(self.command, self.path.removeprefix(PREFIX), content=body, headers=sent)
            self.send_response(answer.status_code)
            for name, value in answer.headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(answer.content)

        do_POST = do_GET  # noqa: N815

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Proxy) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}{PREFIX}"
        server.shutdown()
        thread.join()


def test_index_works_behind_a_proxy(visit: Visit, behind_a_proxy: str) -> None:
    page, _ = visit(behind_a_proxy)
    page.get_by_role("button", name="sample frog.png").click()
    expect(page.locator(".bars")).to_have_count(1)
    page.get_by_role("link", name="API").click()
    expect(page.get_by_role("button", name="/predict").first).to_be_visible()


def test_try_it_out_works_behind_a_proxy(visit: Visit, behind_a_proxy: str) -> None:
    page, watch = visit(behind_a_proxy, "/docs")
    open_predict(page)
    choose(page, 0, EXAMPLES / "cat.png")
    assert "predictions" in execute(page, 200)
    assert watch.asked(f"POST {behind_a_proxy}/predict") == 1
