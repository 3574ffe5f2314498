"""HTTP by hand: a server for a small application, and requests and responses as bytes on a socket."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send

from app.http.http_protocol import Protocol
from app.process.server import Server

TIMEOUT_S = 20


class Response(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes


@contextmanager
def serve(app: ASGIApp, protocol: type[Protocol] = Protocol, **options: object) -> Iterator[Server]:
    """The application on a free port of loopback, in a thread. Ends with the server's shutdown."""
    settings = {"log_config": None, "lifespan": "on", "ws": "none", "server_header": False, **options}
    server = Server(uvicorn.Config(app, port=0, http=protocol, **settings))  # type: ignore[arg-type]
    # Server.run ends the process if other threads still run, as those of another test's service do
    thread = threading.Thread(target=uvicorn.Server.run, args=(server,), daemon=True)
    thread.start()
    wait_until(lambda: server.started)
    try:
        yield server
    finally:
        server.should_exit = True
        thread.join(TIMEOUT_S)
        assert not thread.is_alive()


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def port_of(server: Server) -> int:
    port: int = server.servers[0].sockets[0].getsockname()[1]
    return port


def connect(port: int, receive_buffer: int | None = None) -> socket.socket:
    connection = socket.socket()
    if receive_buffer:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    connection.settimeout(TIMEOUT_S)
    connection.connect(("127.0.0.1", port))
    return connection


def read_to_end(connection: socket.socket) -> bytes:
    """All bytes until the other side closes; raises ConnectionResetError."""
    return b"".join(iter(lambda: connection.recv(1 << 20), b""))


def responses(data: bytes) -> list[Response]:
    """The responses in a row, each with a Content-Length."""
    found = []
    while data:
        head, _, data = data.partition(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")
        status = int(first.split()[1])
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        length = int(headers.get("content-length", 0))
        found.append(Response(status, headers, data[:length]))
        data = data[length:]
    return found


def exchange(port: int, *packets: bytes) -> list[Response]:
    """The responses until the server closes, to packets that are sent one after another."""
    with connect(port) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for packet in packets:
            connection.sendall(packet)
            time.sleep(0.02)
        return responses(read_to_end(connection))


def request(target: str, body: bytes = b"", headers: str = "", method: str | None = None) -> bytes:
    method = method or ("POST" if body else "GET")
    length = f"Content-Length: {len(body)}\r\n" if body else ""
    return f"{method} {target} HTTP/1.1\r\nHost: x\r\n{length}{headers}\r\n".encode() + body


CLOSE = "Connection: close\r\n"


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    """Responds with method, path and body; handles the lifespan."""
    if scope["type"] == "lifespan":
        while (await receive())["type"] != "lifespan.shutdown":
            await send({"type": "lifespan.startup.complete"})
        await send({"type": "lifespan.shutdown.complete"})
        return
    body, more = b"", True
    while more:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
    await respond(send, f"{scope['method']} {scope['path']} ".encode() + body)


async def respond(send: Send, body: bytes, status: int = 200) -> None:
    headers = [(b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def send_half(connection: socket.socket, image: bytes, headers: str = "") -> None:
    """The head of a prediction request and 100 bytes of its body. The service answers 100 once it has admitted it."""
    head = f"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: {len(image)}\r\n{headers}"
    connection.sendall(f"{head}Expect: 100-continue\r\n\r\n".encode())
    assert connection.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
    connection.sendall(image[:100])
