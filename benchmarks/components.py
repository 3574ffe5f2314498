"""CPU time of each part of a request's way, beside what it took the place of.

python -m benchmarks.components
"""

import asyncio
import io
import logging
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor

from fastapi import FastAPI, Request
from pydantic_core import to_json
from starlette.types import ASGIApp, Message, Scope

from app.model.preprocessing import decode
from app.settings import Settings
from app.telemetry.logs import AccessLog
from benchmarks.bare_asgi import app as hello
from benchmarks.client import form
from benchmarks.serving import LIMITS, parse, per_call_us, pictures

SETTINGS = Settings()
FILE = pictures(None, 1)[0]
BODY = form([FILE]).partition(b"\r\n\r\n")[2]
SCOPE: Scope = {
    "type": "http",
    "asgi": {"version": "3.0"},
    "http_version": "1.1",
    "method": "POST",
    "path": "/",
    "raw_path": b"/",
    "query_string": b"",
    "root_path": "",
    "scheme": "http",
    "headers": [
        (b"content-type", b"multipart/form-data; boundary=BOUNDARY"),
        (b"content-length", str(len(BODY)).encode()),
    ],
}


async def receive() -> Message:
    return {"type": "http.request", "body": BODY, "more_body": False}


async def send(_: Message) -> None:
    pass


async def per_await_us(work: Callable[[], Awaitable[object]], seconds: float = 0.5) -> float:
    """Microseconds of CPU of all threads a call, the best of three tries."""
    best = float("inf")
    for _ in range(3):
        await work()
        begun, calls = time.process_time(), 0
        while time.process_time() - begun < seconds / 3:
            await work()
            calls += 1
        best = min(best, (time.process_time() - begun) / calls * 1e6)
    return best


def asked(app: ASGIApp) -> Callable[[], Awaitable[object]]:
    return lambda: app({**SCOPE, "state": {}}, receive, send)


def framework() -> FastAPI:
    api = FastAPI()

    @api.post("/")
    async def predict(request: Request) -> dict[str, int]:
        return {"bytes": len(await request.body())}

    return api


def log_line() -> Callable[[int], object]:
    logger = logging.Logger("lines")
    logger.addHandler(logging.StreamHandler(io.StringIO()))
    return lambda i: logger.info("%s %s %s", "POST", "/predict", 200)


async def table() -> list[tuple[str, float, str, float]]:
    loop, log = asyncio.get_running_loop(), AccessLog("text", io.StringIO())
    hop = ThreadPoolExecutor(1)
    top = [{"label": "cat", "probability": 0.9} for _ in range(3)]
    answer = {"model": {"name": "cifar10", "version": "0"}, "predictions": [{"filename": "a", "top": top}]}
    return [
        ("a bare ASGI response", await per_await_us(asked(hello)),
         "FastAPI's route with a body and a model", await per_await_us(asked(framework()))),
        ("form parser", per_call_us(lambda i: parse(BODY, SETTINGS)),
         "", 0.0),
        ("decoding where the request is", per_call_us(lambda i: decode(FILE[1], LIMITS)),
         "in a thread", await per_await_us(lambda: loop.run_in_executor(hop, decode, FILE[1], LIMITS))),
        ("our line in the log, buffered", per_call_us(lambda i: log.add("POST", "/predict", 200, 0.1, "id")),
         "logging's", per_call_us(log_line())),
        ("the answer's JSON", per_call_us(lambda i: to_json(answer)), "", 0.0),
    ]  # fmt: skip


def main() -> None:
    print("| part | us | in place of | us |\n| --- | ---: | --- | ---: |")
    for ours, us, theirs, theirs_us in asyncio.run(table()):
        print(f"| {ours} | {us:.1f} | {theirs} | {theirs_us or '':{'.1f' if theirs_us else ''}} |")


if __name__ == "__main__":
    main()
