"""The least that any service on uvicorn does: read the body, answer a few bytes."""

from starlette.types import Receive, Scope, Send

ANSWER = b'{"model":{"name":"cifar10","version":"00000000"},"predictions":[]}' + b" " * 200


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    while (await receive()).get("more_body"):
        pass
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(ANSWER)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": ANSWER})
