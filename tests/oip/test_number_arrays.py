"""Arrays of numbers cut out of JSON and parsed in slices, against Python's own parser."""

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from app.errors import MalformedUpload, RequestError, TooLarge
from app.oip.number_arrays import MAX_JSON_WITHOUT_DATA, MAX_KEYS, SLICE, extract, parse, split

ARRAY = np.random.default_rng(0).integers(0, 256, (30, 20, 20, 3), np.uint8)
STYLES: list[dict[str, Any]] = [{}, {"separators": (",", ":")}, {"indent": 1}, {"indent": "\t"}]

small = arrays(np.uint8, st.tuples(st.integers(1, 3), st.just(2), st.just(2), st.just(3)))


def request(data: Any, **style: Any) -> bytes:
    return json.dumps({"id": "a", "inputs": [{"name": "image", "data": data, "shape": [1]}], "x": 1}, **style).encode()


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("nested", [False, True])
def test_arrays_longer_than_a_slice_arrive(style: dict[str, Any], nested: bool) -> None:
    text = request(ARRAY.tolist() if nested else ARRAY.ravel().tolist(), **style)
    assert len(text) > 3 * SLICE
    rest, (array,), other = extract(text)
    assert json.loads(rest) == json.loads(request([0]))
    assert other == b""
    assert np.array_equal(parse(array, ARRAY.shape, "image"), ARRAY)


@given(array=small, nested=st.booleans(), style=st.sampled_from(STYLES), data=st.data())
def test_damaged_arrays_are_refused_or_mean_the_same(
    array: Any, nested: bool, style: dict[str, Any], data: st.DataObject
) -> None:
    text = json.dumps(array.tolist() if nested else array.ravel().tolist(), **style).encode()
    place = data.draw(st.integers(0, len(text)))
    cut = data.draw(st.integers(0, 3))
    damaged = text[:place] + data.draw(st.text("[],019 \n", max_size=3)).encode() + text[place + cut :]
    try:
        parsed = parse(damaged, array.shape, "image")
    except MalformedUpload:
        return
    assert np.array_equal(np.array(json.loads(damaged)).reshape(array.shape), parsed)


@given(text=st.text('{}[],:"\\d01. \ndata', max_size=60))
def test_noise_around_the_key_raises_nothing(text: str) -> None:
    rest, found, _ = extract(f'{{"data"{text}'.encode())
    assert len(rest) + sum(map(len, found)) >= len(text)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        (b'{"data": [1, 2], "data" : [[3]] }', 2),
        (b'{"x": "\\"data\\": [1]"}', 0),
        (b'{"x\\"data": [1]}', 0),
        (b'{"data": [1.5]}', 0),
        (b'{"data": [-1]}', 0),
        (b'{"data": [[1], [2.5]]}', 0),
        (b'{"data": ["1"]}', 0),
        (b'{"data": 1}', 0),
        (b'{"data": [1', 0),
        (b'{"data" [1]}', 0),
    ],
)
def test_only_arrays_of_whole_numbers_are_cut_out(text: bytes, count: int) -> None:
    extracted = extract(text)
    assert len(extracted.arrays) == count
    assert count or extracted.rest == text


def test_endless_arrays_are_left_in_the_text() -> None:
    extracted = extract(b'{"data":[1]}' * 1000)
    assert len(extracted.arrays) == MAX_KEYS
    assert len(extracted.rest) > 11_000
    with pytest.raises(TooLarge):
        split(b'{"x": [' + b'"data",' * 100_000 + b"0]}")


def test_byte_order_mark_is_ignored() -> None:
    assert split(b"\xef\xbb\xbf" + request([1, 2])).arrays == [b"[1, 2]"]


LONG = MAX_JSON_WITHOUT_DATA + 1


@pytest.mark.parametrize(
    ("text", "kind", "part"),
    [
        (request([[]] * LONG), MalformedUpload, "must be whole numbers from 0 to 255"),
        (request([0.5] * LONG), MalformedUpload, "is no list of whole numbers; it must be whole numbers from 0 to 255"),
        (request([{}] * LONG), MalformedUpload, "is an object"),
        (request(["a" * LONG]), MalformedUpload, "is text; it must be"),
        (request("iVBORw0KGgoAAAANSUhEUgAA" + "A" * LONG), MalformedUpload, "is base64 text of a PNG file"),
        (b'{"id": "' + b"a" * LONG + b'"}', TooLarge, "at most 16384 are accepted"),
        (b'{"x":' + b"[" * LONG, TooLarge, "at most 16384 are accepted"),
        (b'{"inputs": []}' + bytes(LONG), TooLarge, "needs the header Inference-Header-Content-Length"),
        (request([0] * LONG + [1000]), MalformedUpload, "must be whole numbers from 0 to 255"),
        (b'{"data": [' + b" " * 2 * SLICE + b"]}", MalformedUpload, "no comma"),
    ],
)
def test_long_text_is_refused_with_its_reason(text: bytes, kind: type[RequestError], part: str) -> None:
    with pytest.raises(kind, match=part):
        parse(split(text).arrays[0], [LONG + 1], "image")
