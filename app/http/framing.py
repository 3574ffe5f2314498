"""Cuts what a connection receives into pieces that hold parts of one request only; heads without an upgrade."""

from app.errors import MalformedRequest

END_OF_HEAD = b"\r\n\r\n"
CHUNKED_PIECE_BYTES = 4096  # one-byte chunks: 700 callbacks, under a millisecond

Headers = list[tuple[bytes, bytes]]


class Framing:
    """Where the next piece ends, by what the parser expects: a head, `body_left` bytes of a body, or chunks of one.

    The parser goes on to the next request in the same piece. A piece that ends where the request ends keeps the next
    one unparsed until the response is sent: pipelined requests need no queue, and their number no limit. A chunked body
    is cut into pieces of CHUNKED_PIECE_BYTES instead, since only the parser finds its end.
    """

    def __init__(self) -> None:
        self.chunked = False
        self.body_left = 0
        self.head_bytes = 0  # of the current head, in all pieces
        self._tail = b""  # of the piece before, which may hold the start of END_OF_HEAD

    def expect_head(self) -> None:
        self.chunked, self.body_left, self.head_bytes, self._tail = False, 0, 0, b""

    def end_of_piece(self, data: bytes, start: int) -> int:
        """The end of the piece of `data` from `start` on."""
        if self.chunked:
            return min(len(data), start + CHUNKED_PIECE_BYTES)
        if self.body_left:
            return min(len(data), start + self.body_left)
        end = self._end_of_head(data, start)
        self.head_bytes += end - start
        return end

    def _end_of_head(self, data: bytes, start: int) -> int:
        across = (self._tail + data[start : start + 3]).find(END_OF_HEAD) if self._tail else -1
        if across >= 0:
            end, self._tail = start + across + len(END_OF_HEAD) - len(self._tail), b""
            return end
        found = data.find(END_OF_HEAD, start)
        if found >= 0:
            self._tail = b""
            return found + len(END_OF_HEAD)
        self._tail = (self._tail + data[max(start, len(data) - 3) :])[-3:]
        return len(data)


def check_head(version: str, headers: Headers) -> None:
    """Raises MalformedRequest for a head that proxies and servers may understand differently, which the parser accepts.

    RFC 9112, sections 2.3, 3.2 and 6.1.
    """
    if version not in ("1.0", "1.1"):
        raise MalformedRequest("The request is not HTTP/1.1.")
    hosts = codings = 0
    for name, value in headers:
        hosts += name == b"host"
        codings += name == b"transfer-encoding" and value.lower() != b"chunked"
    if hosts > 1 or (version == "1.1" and not hosts):
        raise MalformedRequest(f"The request has {hosts} Host headers; it must have one.")
    if codings:
        raise MalformedRequest("The only transfer coding that is accepted is chunked.")


def without_upgrade(headers: Headers) -> Headers:
    """The headers without a request for another protocol."""
    kept = [(name, value) for name, value in headers if name not in {b"upgrade", b"http2-settings", b"connection"}]
    options = b",".join(value for name, value in headers if name == b"connection").lower().split(b",")
    others = [option.strip() for option in options if option.strip() not in {b"upgrade", b"http2-settings", b""}]
    return [*kept, (b"connection", b", ".join(others))] if others else kept
