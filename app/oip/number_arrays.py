"""The arrays of numbers in a JSON text, parsed in slices.

A JSON parser holds the interpreter lock for its whole text, and with it the event loop: 45 ms for 4 MB of numbers, as
long for 100 kB of nested lists. So the numbers are cut out of the text, and what is left of it must be short.
"""

from collections.abc import Iterator, Sequence
from math import prod
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic_core import from_json

from app.errors import MalformedUpload, TooLarge
from app.model.containers.stream import find
from app.oip import content

SLICE = 32_768  # bytes that are parsed while other threads wait: half a millisecond
MAX_KEYS = 256  # that are looked at; a request has one
MAX_JSON_WITHOUT_DATA = 16_384  # bytes that are parsed in one piece: 2 ms at most
BYTE_ORDER_MARK = b"\xef\xbb\xbf"  # which RFC 8259 lets a parser ignore
KEY = b'"data"'
SPACES = b" \t\r\n"
NUMBERS = b"0123456789,[]" + SPACES
ZEROS = bytes.maketrans(b"123456789", b"000000000")
WITHOUT_BRACKETS = bytes.maketrans(b"[]", b"  ")


class Extracted(NamedTuple):
    """`rest` is the text with [i] in place of arrays[i]; `other` the start of the first data that is not numbers."""

    rest: bytes
    arrays: list[bytes]
    other: bytes


def split(text: bytes) -> Extracted:
    """Cuts the arrays out of a request; raises MalformedUpload for what is no JSON object, or TooLarge."""
    text = text.removeprefix(BYTE_ORDER_MARK)
    if not text[: content.SAMPLE].lstrip(SPACES).startswith(b"{"):
        found = content.of_body(text[: content.SAMPLE])
        raise MalformedUpload(
            f"The body is {found}; it must be a JSON object, which binary data may follow, or one raw image with "
            "Inference-Header-Content-Length: 0. POST /predict accepts files and forms."
        )
    extracted = extract(text)
    if len(extracted.rest) <= MAX_JSON_WITHOUT_DATA:
        return extracted
    if extracted.other:
        raise MalformedUpload(
            f"The data of the input is {content.of_json(extracted.other)}; it must be whole numbers from 0 to 255, or "
            "follow the JSON in binary."
        )
    raise TooLarge(
        f"The JSON has {len(extracted.rest)} bytes beside data of whole numbers; at most {MAX_JSON_WITHOUT_DATA} are "
        "accepted. Binary data behind it needs the header Inference-Header-Content-Length."
    )


def extract(text: bytes) -> Extracted:
    """Cuts the arrays of digits, commas and brackets out that stand behind a key "data"."""
    rest: list[bytes] = []
    arrays: list[bytes] = []
    done, place, other = 0, 0, b""
    for _ in range(MAX_KEYS):
        place = find(text, KEY, place, len(text))
        if place < 0:
            break
        is_key = text[max(0, place - 1) : place] != b"\\"  # else the first quotation mark belongs to a string
        place += len(KEY)
        start = _start_of_value(text, place) if is_key else None
        if start is None:
            continue
        place, end = _end_of_numbers(text, start)
        if end is not None:
            rest += [text[done:start], b"[%d]" % len(arrays)]
            arrays.append(text[start:end])
            done = place = end
        other = other or (b"" if end is not None else text[place : place + content.SAMPLE])
    return Extracted(b"".join([*rest, text[done:]]), arrays, other)


def parse(array: bytes, shape: Sequence[int], name: str) -> NDArray[np.uint8]:
    """The array in its shape, from JSON that is flat or nested as the shape says; raises MalformedUpload."""
    values, outline = bytearray(), []
    for piece in _pieces(array):
        try:
            values += bytes(from_json(b"[" + piece.translate(WITHOUT_BRACKETS) + b"]"))
        except ValueError as error:
            raise MalformedUpload(f"The data of input '{name}' must be whole numbers from 0 to 255.") from error
        outline.append(piece.translate(ZEROS, SPACES).replace(b"000", b"0").replace(b"00", b"0"))
        if len(values) > prod(shape):
            break
    found = b",".join(outline)
    if len(values) != prod(shape) or found != _outline(shape if found.startswith(b"[[") else [prod(shape)]):
        raise MalformedUpload(f"The data of input '{name}' does not fit its shape {list(shape)}.")
    return np.frombuffer(values, np.uint8).reshape(shape)


def _outline(shape: Sequence[int]) -> bytes:
    """JSON without spaces of zeros in this shape."""
    text = b"0"
    for length in reversed(shape):
        text = b"[" + b",".join([text] * length) + b"]"
    return text


def _pieces(array: bytes) -> Iterator[bytes]:
    """The array between commas about SLICE apart."""
    start = 0
    while len(array) - start > SLICE:
        end = array.rfind(b",", start, start + SLICE)
        if end < 0:
            raise MalformedUpload(f"The data has no comma within {SLICE} bytes.")
        yield array[start:end]
        start = end + 1
    yield array[start:]


def _start_of_value(text: bytes, place: int) -> int | None:
    """Behind the colon from `place` on, where a value starts; None without a colon."""
    window = text[place : place + SLICE]
    colon = len(window) - len(window.lstrip(SPACES))
    if window[colon : colon + 1] != b":":
        return None
    value = window[colon + 1 :]
    return place + colon + 1 + len(value) - len(value.lstrip(SPACES))


def _end_of_numbers(text: bytes, start: int) -> tuple[int, int | None]:
    """Where the characters of number arrays stop, and the end of the array from `start` on if it is one of numbers."""
    stop, depth = start, 0
    for place in range(start, len(text), SLICE):
        window = text[place : place + SLICE]
        kept = len(window) - len(window.lstrip(NUMBERS))
        depth += window.count(b"[", 0, kept) - window.count(b"]", 0, kept)
        stop = place + kept
        if kept < len(window):
            break
    end = text.rfind(b"]", start, stop) + 1
    is_array = text[start : start + 1] == b"[" and end > start and depth == 0
    return stop, end if is_array else None
