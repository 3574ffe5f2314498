"""What reaches the socket, and when."""

import asyncio
import socket
from contextlib import closing
from pathlib import Path
from typing import Any

from app.api.http_protocol import JOINED_BYTES, Joining
from app.settings import Settings
from tests.conftest import serving


class Sink:
    """A transport that keeps what it is given."""

    def __init__(self) -> None:
        self.written: list[bytes] = []
        self.closed_after: int | None = None

    def write(self, data: bytes) -> None:
        self.written.append(data)

    def close(self) -> None:
        self.closed_after = len(self.written)

    def get_extra_info(self, name: str) -> str:
        return f"{name} of the sink"


def in_a_loop(*turns: list[bytes]) -> Sink:
    """What is left after these writes, each list of them in one turn of an event loop."""
    sink: Any = Sink()

    async def write() -> None:
        joining = Joining(sink, asyncio.get_running_loop())
        for turn in turns:
            for data in turn:
                joining.write(data)
            await asyncio.sleep(0)

    asyncio.run(write())
    return sink


def test_what_is_written_in_one_turn_is_sent_as_one() -> None:
    assert in_a_loop([b"head", b"body"], [b"next head", b"", b"next body"]).written == [
        b"headbody",
        b"next headnext body",
    ]


def test_much_is_handed_on_at_once_for_the_flow_control_to_see() -> None:
    part = bytes(JOINED_BYTES // 2)
    assert list(map(len, in_a_loop([b"head", part, part, part]).written)) == [4 + 2 * len(part), len(part)]


def test_nothing_is_left_behind_when_it_closes() -> None:
    sink: Any = Sink()

    async def write_and_close() -> None:
        joining = Joining(sink, asyncio.get_running_loop())
        joining.write(b"last words")
        joining.close()
        await asyncio.sleep(0)

    asyncio.run(write_and_close())
    assert (sink.written, sink.closed_after) == ([b"last words"], 1)


def test_it_is_the_transport_in_everything_else() -> None:
    sink: Any = Sink()
    nothing: Any = None
    assert Joining(sink, nothing).get_extra_info("peername") == "peername of the sink"


def test_requests_sent_together_are_answered_in_their_order(tiny_weights: Path) -> None:
    with serving(Settings(weights=tiny_weights, max_batch=1)) as client:
        address = ("127.0.0.1", client.base_url.port or 0)
        with closing(socket.create_connection(address, timeout=10)) as connection:
            head = b" HTTP/1.1\r\nHost: x\r\n"
            asked = [b"HEAD /healthz", b"GET /nowhere", b"GET /static/swagger/swagger-ui-bundle.js", b"GET /readyz"]
            connection.sendall(b"".join(path + head + b"\r\n" for path in asked[:-1]))
            connection.sendall(asked[-1] + head + b"Connection: close\r\n\r\n")
            answer = b"".join(iter(lambda: connection.recv(1 << 20), b""))
    statuses = [part[:3] for part in answer.split(b"HTTP/1.1 ")[1:]]
    assert statuses == [b"405", b"404", b"200", b"200"]
    assert len(answer) > 1_000_000
