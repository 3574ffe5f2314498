"""Coalesced writes, two reasons to pause reading, and a close that keeps the response."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from app.http.transport import MAX_COALESCED_BYTES, CoalescingTransport


class FakeTransport:
    """Records the calls."""

    def __init__(self) -> None:
        self.written: list[bytes] = []
        self.calls: list[str] = []
        self.unsent = 0

    def write(self, data: bytes) -> None:
        self.written.append(data)
        self.calls.append("write")

    def close(self) -> None:
        self.calls.append("close")

    def abort(self) -> None:
        self.calls.append("abort")

    def pause_reading(self) -> None:
        self.calls.append("pause_reading")

    def resume_reading(self) -> None:
        self.calls.append("resume_reading")

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None:
        self.calls.append("write_eof")

    def is_closing(self) -> bool:
        return "close" in self.calls or "abort" in self.calls

    def get_write_buffer_size(self) -> int:
        return self.unsent

    def get_extra_info(self, name: str) -> str:
        return f"{name} of the socket"


class FakeLoop:
    """A clock that the test sets, and callbacks that run at the end of an iteration."""

    def __init__(self) -> None:
        self.now = 100.0
        self.ready: list[Callable[[], None]] = []

    def time(self) -> float:
        return self.now

    def call_soon(self, callback: Callable[[], None]) -> None:
        self.ready.append(callback)

    def end_iteration(self) -> None:
        while self.ready:
            self.ready.pop(0)()


@pytest.fixture
def inner() -> FakeTransport:
    return FakeTransport()


@pytest.fixture
def loop() -> FakeLoop:
    return FakeLoop()


@pytest.fixture
def transport(inner: Any, loop: Any) -> CoalescingTransport:
    return CoalescingTransport(inner, loop)


def test_writes_of_one_iteration_are_sent_together(
    transport: CoalescingTransport, inner: FakeTransport, loop: FakeLoop
) -> None:
    for parts in ([b"head", b"body"], [b"next head", b"", b"next body"]):
        for part in parts:
            transport.write(part)
        loop.end_iteration()
    assert inner.written == [b"headbody", b"next headnext body"]


def test_large_writes_are_passed_on_at_once(
    transport: CoalescingTransport, inner: FakeTransport, loop: FakeLoop
) -> None:
    part = bytes(MAX_COALESCED_BYTES // 2)
    for data in (b"head", part, part, part):
        transport.write(data)
    assert list(map(len, inner.written)) == [4 + 2 * len(part)]
    loop.end_iteration()
    assert list(map(len, inner.written)) == [4 + 2 * len(part), len(part)]


def test_a_close_sends_what_was_written(transport: CoalescingTransport, inner: FakeTransport, loop: FakeLoop) -> None:
    transport.write(b"last")
    transport.close()
    transport.write(b"too late")
    loop.end_iteration()
    assert (inner.written, inner.calls) == ([b"last"], ["write", "close"])


def test_nothing_is_written_to_a_lost_connection(
    transport: CoalescingTransport, inner: FakeTransport, loop: FakeLoop
) -> None:
    transport.write(b"response")
    inner.close()  # by the event loop, after an error of the socket
    loop.end_iteration()
    assert inner.written == []


def test_reading_resumes_when_no_reason_to_pause_is_left(transport: CoalescingTransport, inner: FakeTransport) -> None:
    transport.pause_reading()
    transport.hold_reading(True)
    transport.resume_reading()
    assert not transport.is_reading()
    transport.hold_reading(False)
    assert inner.calls == ["pause_reading", "resume_reading"]


def test_reading_does_not_resume_after_the_end_of_file(transport: CoalescingTransport, inner: FakeTransport) -> None:
    transport.pause_reading()
    transport.received_eof = True
    transport.resume_reading()
    assert inner.calls == ["pause_reading"]


def test_a_close_lingers_while_the_client_may_send(
    transport: CoalescingTransport, inner: FakeTransport, loop: FakeLoop
) -> None:
    transport.pause_reading()
    transport.expects_data = True
    transport.write(b"response")
    transport.close()
    assert inner.calls == ["pause_reading", "write", "resume_reading", "write_eof"]
    assert transport.is_closing()
    assert not transport.is_overdue(loop.now + 1)


@pytest.mark.parametrize("bound", ["idle", "total", "bytes"])
def test_a_lingering_close_is_bounded(transport: CoalescingTransport, loop: FakeLoop, bound: str) -> None:
    transport.expects_data = True
    transport.close()
    if bound == "idle":
        loop.now += transport.linger_idle_s + 0.1
    elif bound == "total":
        loop.now += transport.linger_s + 0.1
        transport.discard(1)
    else:
        transport.discard(transport.linger_bytes + 1)
    assert transport.is_overdue(loop.now)


def test_a_close_waits_for_a_slow_reader_only_so_long(
    transport: CoalescingTransport, inner: FakeTransport, loop: FakeLoop
) -> None:
    inner.unsent = 1000
    transport.close()
    assert not transport.is_overdue(loop.now + transport.flush_s - 0.1)
    assert transport.is_overdue(loop.now + transport.flush_s + 0.1)


def test_other_calls_reach_the_transport(transport: CoalescingTransport) -> None:
    assert transport.get_extra_info("peername") == "peername of the socket"


def test_the_event_loops_own_transport_is_coalesced() -> None:
    """One segment for head and body, on a real socket."""
    received: list[bytes] = []

    async def main() -> None:
        class Client(asyncio.Protocol):
            def data_received(self, data: bytes) -> None:
                received.append(data)

        class Server(asyncio.Protocol):
            def connection_made(self, transport: asyncio.BaseTransport) -> None:
                assert isinstance(transport, asyncio.Transport)
                coalescing = CoalescingTransport(transport, asyncio.get_running_loop())
                coalescing.write(b"head")
                coalescing.write(b"body")

        loop = asyncio.get_running_loop()
        server = await loop.create_server(Server, "127.0.0.1", 0)
        client, _ = await loop.create_connection(Client, *server.sockets[0].getsockname())
        while not received:
            await asyncio.sleep(0.01)
        client.close()
        server.close()

    asyncio.run(main())
    assert received == [b"headbody"]
