"""Every piece for the parser ends where a request ends."""

from hypothesis import given
from hypothesis import strategies as st

from app.http.framing import CHUNKED_PIECE_BYTES, Framing

HEADS = st.sampled_from(
    [b"GET / HTTP/1.1\r\nHost: x", b"\r\nGET / HTTP/1.1\r\nHost: x", b"POST /predict HTTP/1.1\r\nA: \r"]
)
BODIES = st.sampled_from([b"", b"\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n", b"x" * 100, b"\r", b"\n\r\n\r\n\r"])
REQUESTS = st.lists(st.tuples(HEADS, BODIES), max_size=6)


def pieces_of(packets: list[bytes], bodies: list[int]) -> list[bytes]:
    """The pieces, if the parser finds these body lengths behind the heads."""
    framing, pieces, lengths = Framing(), [], iter(bodies)
    head = b""
    for packet in packets:
        position = 0
        while position < len(packet):
            in_body = framing.body_left > 0
            end = framing.end_of_piece(packet, position)
            piece, position = packet[position:end], end
            pieces.append(piece)
            if in_body:
                framing.body_left -= len(piece)
            else:
                head += piece
                if head.endswith(b"\r\n\r\n") and head.strip():
                    head, framing.body_left = b"", next(lengths)
            if not framing.body_left and not head:
                framing.expect_head()
    return pieces


@given(REQUESTS, st.lists(st.integers(1, 40), min_size=1))
def test_no_piece_holds_parts_of_two_requests(requests: list[tuple[bytes, bytes]], sizes: list[int]) -> None:
    data = b"".join(head + b"\r\n\r\n" + body for head, body in requests)
    packets, position = [], 0
    while position < len(data):
        size = sizes[len(packets) % len(sizes)]
        packets.append(data[position : position + size])
        position += size
    pieces = pieces_of(packets, [len(body) for _, body in requests])
    assert b"".join(pieces) == data
    ends, end = {0}, 0
    for piece in pieces:
        ends.add(end := end + len(piece))
    border = 0
    for head, body in requests:
        assert border + len(head) + 4 in ends
        border += len(head) + 4 + len(body)
        assert border in ends


def test_a_whole_packet_is_one_piece_in_a_body() -> None:
    framing = Framing()
    framing.body_left = 1_000_000
    assert framing.end_of_piece(bytes(256_000), 0) == 256_000


def test_a_chunked_body_is_cut_into_small_pieces() -> None:
    framing = Framing()
    framing.chunked = True
    assert framing.end_of_piece(bytes(256_000), 10) == 10 + CHUNKED_PIECE_BYTES


def test_head_bytes_count_all_pieces_of_a_head() -> None:
    framing = Framing()
    for _ in range(3):
        framing.end_of_piece(b"GET /" + b"a" * 95, 0)
    assert framing.head_bytes == 300
    framing.expect_head()
    assert framing.head_bytes == 0
