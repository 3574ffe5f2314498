"""The connections that the kernel has accepted and the event loop has not."""

import asyncio
import os
import socket
from collections.abc import Callable, Iterator
from functools import partial
from typing import cast

import uvicorn

HANDSHAKE_S = 0.5  # for TLS


async def serve_backlog(server: uvicorn.Server) -> None:
    """Closes the listening sockets and serves their backlog, which the kernel resets otherwise."""
    waiting = [connection for each in server.servers for connection in _accept_all(each)]
    for each in server.servers:
        each.close()
    await asyncio.gather(*(_serve(server, connection) for connection in waiting), return_exceptions=True)


async def _serve(server: uvicorn.Server, connection: socket.socket) -> None:
    # as in uvicorn's own `create_protocol`
    build = cast(Callable[..., asyncio.Protocol], server.config.http_protocol_class)
    protocol = partial(build, config=server.config, server_state=server.server_state, app_state=server.lifespan.state)
    async with asyncio.timeout(HANDSHAKE_S):
        await asyncio.get_running_loop().connect_accepted_socket(protocol, connection, ssl=server.config.ssl)


def _accept_all(server: asyncio.Server) -> Iterator[socket.socket]:
    for listener in server.sockets:
        with socket.socket(fileno=os.dup(listener.fileno())) as listening:
            listening.setblocking(False)
            while True:
                try:
                    connection, _ = listening.accept()
                except OSError:  # none is left, or no descriptor
                    break
                connection.setblocking(False)
                yield connection
