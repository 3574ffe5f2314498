"""The least that an ASGI application does: read the body, respond with a few bytes."""

from starlette.types import Receive, Scope, Send

BODY = b'{"model":{"name":"cifar10","version":"00000000"},"predictions":[]}' + b" " * 200


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    while (await receive()).get("more_body"):
        pass
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(BODY)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": BODY})
