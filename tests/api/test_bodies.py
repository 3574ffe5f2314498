"""Bodies in chunks of any size, under their limit."""

import asyncio
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.api.bodies import JOINED_BYTES, Collector, read_body
from app.errors import ClientDisconnected, TooLarge

CHUNK = bytes(range(256)) * 256


def collected(sizes: list[int], limit: int, expected: int = 0) -> bytes:
    collector = Collector(limit, "too large", expected)
    for size in sizes:
        collector.add(CHUNK[:size])
    return bytes(collector.body())


@given(sizes=st.lists(st.integers(0, len(CHUNK)), max_size=50))
def test_chunks_are_joined_in_order(sizes: list[int]) -> None:
    assert collected(sizes, 10_000_000) == b"".join(CHUNK[:size] for size in sizes)


def test_large_bodies_end_at_the_limit() -> None:
    count = 3 * JOINED_BYTES // len(CHUNK)
    limit = count * len(CHUNK)
    assert collected([len(CHUNK)] * count, limit) == CHUNK * count
    with pytest.raises(TooLarge, match="too large"):
        collected([len(CHUNK)] * count, limit - 1)


@pytest.mark.parametrize("expected", [0, 1, 3 * JOINED_BYTES, 10**30])
def test_declared_length_does_not_change_a_body(expected: int) -> None:
    """Nor does a limit beyond the memory of the machine."""
    sizes = [len(CHUNK)] * (3 * JOINED_BYTES // len(CHUNK))
    limit = 10**30 if expected < 10**30 else 4 * JOINED_BYTES
    assert collected(sizes, limit, expected) == CHUNK * len(sizes)


def test_client_that_leaves_within_the_body_is_reported() -> None:
    messages: Iterator[dict[str, object]] = iter(
        [{"type": "http.request", "body": b"a", "more_body": True}, {"type": "http.disconnect"}]
    )

    async def receive() -> dict[str, object]:
        return next(messages)

    with pytest.raises(ClientDisconnected):
        asyncio.run(read_body(receive, {}, 10))
