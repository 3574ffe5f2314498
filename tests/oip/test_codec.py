"""The Open Inference Protocol's bytes, against the protocol's own client and against noise."""

import gzip
import json
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from tritonclient.http import InferenceServerClient, InferInput, InferRequestedOutput

from app.api.bodies import decompress
from app.errors import MalformedUpload, RequestError, TooLarge, UnsupportedImage
from app.oip.codec import MAX_JSON, ParsedRequest, encode, parse
from app.oip.outputs import SelectedOutput
from app.oip.tensors import TensorSpec

PIXELS = TensorSpec("image", "UINT8", (-1, 2, 2, 3))
FILES = TensorSpec("image", "BYTES", (-1,))
OUTPUT_SPEC = TensorSpec("probabilities", "FP32", (-1, 4))
TEXT, BINARY = SelectedOutput(OUTPUT_SPEC, binary=False), SelectedOutput(OUTPUT_SPEC, binary=True)
CLASSES = ["cat", "dog", "a:b", "wal"]
MOST = 5
IMAGE = {"name": "image", "datatype": "UINT8", "shape": [1, 2, 2, 3]}
ZEROS = {**IMAGE, "data": [0] * 12}
FILE = {"name": "image", "datatype": "BYTES", "shape": [2]}

images = arrays(np.uint8, st.tuples(st.integers(1, MOST), st.just(2), st.just(2), st.just(3)))
probabilities = arrays(np.float32, st.tuples(st.integers(1, MOST), st.just(4)), elements=st.floats(0, 1, width=32))


def read(body: bytes, json_length: int | bytes | None = None, spec: TensorSpec = PIXELS) -> ParsedRequest:
    length = str(json_length).encode() if isinstance(json_length, int) else json_length
    return parse(body, length, spec, [OUTPUT_SPEC], MOST)


def said(request: dict[str, Any], rest: bytes | None = None, spec: TensorSpec = PIXELS) -> ParsedRequest:
    text = json.dumps(request).encode()
    return read(text, None, spec) if rest is None else read(text + rest, len(text), spec)


def tensor(values: Any, datatype: str, binary: bool) -> InferInput:
    array = np.array(values, object) if datatype == "BYTES" else values
    given = InferInput("image", list(array.shape), datatype)
    given.set_data_from_numpy(array, binary_data=binary)
    return given


def as_client_says(given: InferInput, **options: Any) -> tuple[bytes, int | None]:
    body: tuple[bytes, int | None] = InferenceServerClient.generate_request_body([given], **options)
    return body


@pytest.mark.slow
@given(image=images, binary=st.booleans(), name=st.text(min_size=1, max_size=9), timeout=st.integers(0, 2**63 - 1))
def test_pixels_arrive_as_the_client_sent_them(image: Any, binary: bool, name: str, timeout: int) -> None:
    body, length = as_client_says(tensor(image, "UINT8", binary), request_id=name, timeout=timeout, priority=3)
    assert (length is None) is not binary
    request = read(body, length)
    assert np.array_equal(request.images, image)
    assert (request.id, request.outputs, request.timeout_us) == (name, [BINARY], timeout)


@given(image=images)
def test_pixels_arrive_from_nested_and_from_flat_json(image: Any) -> None:
    for data in (image.tolist(), image.ravel().tolist()):
        request = said({"inputs": [{**IMAGE, "shape": image.shape, "data": data}]})
        assert np.array_equal(request.images, image)
        assert request.outputs == [TEXT]


@given(files=st.lists(st.binary(max_size=20), min_size=1, max_size=MOST))
def test_files_arrive_as_the_client_sent_them(files: list[bytes]) -> None:
    body, length = as_client_says(tensor(files, "BYTES", binary=True))
    assert read(body, length, FILES).images == files


@given(image=images.filter(lambda image: len(image) == 1), file=st.binary(max_size=20))
def test_a_raw_body_is_one_image(image: Any, file: bytes) -> None:
    request = read(image.tobytes(), 0)
    assert np.array_equal(request.images, image)
    assert request.outputs == [BINARY]
    assert read(file, 0, FILES).images == [file]


@pytest.mark.parametrize("default", [None, True, False])
@pytest.mark.parametrize("own", [None, True, False])
@pytest.mark.parametrize("top", [None, 0, 2, 2**40])
def test_how_the_answer_is_wanted(default: bool | None, own: bool | None, top: int | None) -> None:
    wanted = {"binary_data": own, "classification": top}
    wanted = {name: value for name, value in wanted.items() if value is not None}
    request = said(
        {
            "parameters": {} if default is None else {"binary_data_output": default},
            "inputs": [ZEROS],
            "outputs": [{"name": "probabilities", "parameters": wanted}],
        }
    )
    assert request.outputs == [SelectedOutput(OUTPUT_SPEC, bool(default) if own is None else own, top or 0)]


@given(rows=probabilities, binary=st.booleans())
def test_probabilities_leave_bit_for_bit(rows: Any, binary: bool) -> None:
    body, length = encode({"model_name": "m", "id": "7"}, [(SelectedOutput(OUTPUT_SPEC, binary), rows)], CLASSES)
    result = InferenceServerClient.parse_response_body(body, header_length=length)
    back = result.as_numpy("probabilities")
    assert back.dtype == np.float32
    assert back.tobytes() == rows.tobytes()
    assert back.shape == rows.shape
    assert result.get_response()["id"] == "7"


@given(rows=probabilities, binary=st.booleans(), top=st.integers(1, 6))
def test_classes_leave_as_text(rows: Any, binary: bool, top: int) -> None:
    body, length = encode({}, [(SelectedOutput(OUTPUT_SPEC, binary, top), rows)], CLASSES)
    result = InferenceServerClient.parse_response_body(body, header_length=length)
    texts = result.as_numpy("probabilities")
    assert texts.shape == (len(rows), min(top, 4))
    for row, best in zip(rows, texts.tolist(), strict=True):
        split = [(text.decode() if binary else text).split(":", 2) for text in best]
        order = sorted(range(4), key=lambda i: (-row[i], i))[:top]
        assert split == [[f"{row[i]:.6f}", str(i), CLASSES[i]] for i in order]


OUTPUT = {"name": "probabilities"}
REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "no body": (lambda: read(b""), "body is empty; it must be a JSON object"),
    "no JSON": (lambda: read(b"\x89PNG"), "must be a JSON object"),
    "not UTF-8": (lambda: read(b'{"id": "\xff"}'), "Invalid JSON"),
    "deep": (lambda: read(b'{"x":' + b"[" * 10_000), "recursion"),
    "long": (lambda: read(b'{"id": "' + b"a" * MAX_JSON + b'"}'), "over 10000000 bytes"),
    "length is no number": (lambda: read(b"{}", b"x"), "Length is x"),
    "length is negative": (lambda: read(b"{}", b"-2"), "Length is -2"),
    "length is long": (lambda: read(b"{}", b"9" * 5000), "Length is 999"),
    "length is over the body": (lambda: read(b"{}", b"3"), "at most the body's 2 bytes"),
    "JSON is cut": (lambda: read(json.dumps({"inputs": [ZEROS]}).encode(), b"20"), "Invalid JSON"),
    "no inputs": (lambda: said({}), "inputs: Field required"),
    "no input": (lambda: said({"inputs": []}), "the request has none"),
    "two inputs": (lambda: said({"inputs": [ZEROS, ZEROS]}), "the request has image, image"),
    "unknown input": (lambda: said({"inputs": [{**ZEROS, "name": "x"}]}), "one input, 'image'; the request has x"),
    "long name": (lambda: said({"inputs": [{**ZEROS, "name": "x" * 999}]}), r"has x{80}\.\.\."),
    "wrong datatype": (lambda: said({"inputs": [{**ZEROS, "datatype": "FP32"}]}), "of UINT8, not FP32"),
    "negative dimension": (lambda: said({"inputs": [{**ZEROS, "shape": [-1, 2, 2, 3]}]}), r"shape\.0: .* greater than"),
    "no image": (lambda: said({"inputs": [{**ZEROS, "shape": [0, 2, 2, 3]}]}), "must be"),
    "huge dimension": (lambda: said({"inputs": [{**ZEROS, "shape": [2**62, 2, 2, 3]}]}), "not so much data"),
    "overflowing dimension": (lambda: said({"inputs": [{**ZEROS, "shape": [2**70, 2, 2, 3]}]}), "not so much data"),
    "overflowing product": (lambda: said({"inputs": [{**ZEROS, "shape": [1, 2**32, 2**32, 3]}]}), "must be"),
    "too few dimensions": (lambda: said({"inputs": [{**ZEROS, "shape": [2, 2, 3]}]}), "must be"),
    "too many dimensions": (lambda: said({"inputs": [{**ZEROS, "shape": [1, 2, 2, 3, 1]}]}), "must be"),
    "endless dimensions": (lambda: said({"inputs": [{**ZEROS, "shape": [1] * 99}]}), "at most 64 items"),
    "endless inputs": (lambda: said({"inputs": [ZEROS] * 99}), "at most 64 items"),
    "no dimensions": (lambda: said({"inputs": [{**ZEROS, "shape": []}]}), "must be"),
    "shape of text": (lambda: said({"inputs": [{**ZEROS, "shape": ["1", 2, 2, 3]}]}), "valid integer"),
    "shape of flags": (lambda: said({"inputs": [{**ZEROS, "shape": [True, 2, 2, 3]}]}), "valid integer"),
    "too many images": (
        lambda: said({"inputs": [{**ZEROS, "shape": [6, 2, 2, 3], "data": [0] * 72}]}),
        "more than 5 images",
    ),
    "no data": (lambda: said({"inputs": [IMAGE]}), "either data or"),
    "data twice": (
        lambda: said({"inputs": [{**ZEROS, "parameters": {"binary_data_size": 12}}]}, bytes(12)),
        "either data or",
    ),
    "data of text": (lambda: said({"inputs": [{**IMAGE, "data": ["0"] * 12}]}), "whole numbers from 0 to 255"),
    "data of flags": (lambda: said({"inputs": [{**IMAGE, "data": [True] * 12}]}), "whole numbers from 0 to 255"),
    "data of fractions": (lambda: said({"inputs": [{**IMAGE, "data": [0.5] * 12}]}), "whole numbers from 0 to 255"),
    "data over 255": (lambda: said({"inputs": [{**IMAGE, "data": [256] * 12}]}), "whole numbers from 0 to 255"),
    "data under 0": (lambda: said({"inputs": [{**IMAGE, "data": [-1] * 12}]}), "whole numbers from 0 to 255"),
    "data too short": (lambda: said({"inputs": [{**IMAGE, "data": [0] * 11}]}), "does not fit its shape"),
    "data empty": (lambda: said({"inputs": [{**IMAGE, "data": []}]}), "does not fit its shape"),
    "data nested otherwise": (
        lambda: said({"inputs": [{**IMAGE, "data": np.zeros((1, 3, 2, 2), int).tolist()}]}),
        "does not fit its shape",
    ),
    "data nested deeper": (
        lambda: said({"inputs": [{**IMAGE, "data": np.zeros((1, 2, 2, 3, 1), int).tolist()}]}),
        "does not fit its shape",
    ),
    "data ragged": (lambda: said({"inputs": [{**IMAGE, "data": [[[[0] * 3] * 2, [0]]]}]}), "does not fit its shape"),
    "strings of numbers": (lambda: said({"inputs": [{**FILE, "data": [1, 2]}]}, spec=FILES), "is whole numbers"),
    "half a character": (
        lambda: read(b'{"inputs":[{"name":"image","datatype":"BYTES","shape":[1],"data":["\\ud800"]}]}', None, FILES),
        "Invalid JSON",
    ),
    "size is another": (
        lambda: said({"inputs": [{**IMAGE, "parameters": {"binary_data_size": 11}}]}, bytes(11)),
        "binary_data_size is 11; .* has 12 bytes",
    ),
    "size is negative": (
        lambda: said({"inputs": [{**IMAGE, "parameters": {"binary_data_size": -1}}]}, bytes(12)),
        "binary_data_size: .* greater than",
    ),
    "bytes missing": (
        lambda: said({"inputs": [{**IMAGE, "parameters": {"binary_data_size": 12}}]}, bytes(10)),
        "expecting 2 additional bytes",
    ),
    "header missing": (
        lambda: said({"inputs": [{**IMAGE, "parameters": {"binary_data_size": 12}}]}),
        "expecting 12 additional bytes",
    ),
    "bytes left over": (
        lambda: said({"inputs": [{**IMAGE, "parameters": {"binary_data_size": 12}}]}, bytes(13)),
        "additional input data",
    ),
    "bytes after JSON's data": (lambda: said({"inputs": [ZEROS]}, b"x"), "additional input data"),
    "element is cut": (
        lambda: said({"inputs": [{**FILE, "parameters": {"binary_data_size": 8}}]}, b"\1\0\0\0a\5\0\0", FILES),
        "ends within its element 1",
    ),
    "element's length is cut": (
        lambda: said({"inputs": [{**FILE, "parameters": {"binary_data_size": 5}}]}, b"\1\0\0\0a", FILES),
        "ends within its element 1",
    ),
    "element is huge": (
        lambda: said({"inputs": [{**FILE, "parameters": {"binary_data_size": 4}}]}, b"\xff" * 4, FILES),
        "ends within its element 0",
    ),
    "elements left over": (
        lambda: said({"inputs": [{**FILE, "parameters": {"binary_data_size": 12}}]}, bytes(12), FILES),
        "more bytes than its 2 elements",
    ),
    "too many files": (
        lambda: said({"inputs": [{**FILE, "shape": [6], "parameters": {"binary_data_size": 24}}]}, bytes(24), FILES),
        "more than 5 images",
    ),
    "raw of another size": (lambda: read(bytes(11), 0), "11 bytes; one image has 12"),
    "unknown output": (
        lambda: said({"inputs": [ZEROS], "outputs": [{"name": "x"}]}),
        "has no output 'x'; it has 'probabilities'",
    ),
    "output twice": (lambda: said({"inputs": [ZEROS], "outputs": [OUTPUT, OUTPUT]}), "'probabilities' twice"),
    "binary_data is no flag": (
        lambda: said({"inputs": [ZEROS], "outputs": [{**OUTPUT, "parameters": {"binary_data": 1}}]}),
        "valid boolean",
    ),
    "classification is negative": (
        lambda: said({"inputs": [ZEROS], "outputs": [{**OUTPUT, "parameters": {"classification": -1}}]}),
        "greater than",
    ),
    "input in shared memory": (
        lambda: said({"inputs": [{**IMAGE, "parameters": {"shared_memory_region": "x"}}]}),
        "Shared memory is not supported",
    ),
    "output in shared memory": (
        lambda: said({"inputs": [ZEROS], "outputs": [{**OUTPUT, "parameters": {"shared_memory_region": "x"}}]}),
        "Shared memory is not supported",
    ),
    "timeout is negative": (lambda: said({"inputs": [ZEROS], "parameters": {"timeout": -1}}), "timeout"),
    "timeout is huge": (lambda: said({"inputs": [ZEROS], "parameters": {"timeout": 2**63}}), "timeout"),
    "timeout is text": (lambda: said({"inputs": [ZEROS], "parameters": {"timeout": "1"}}), "timeout"),
    "id is a number": (lambda: said({"id": 7, "inputs": [ZEROS]}), "id: .* valid string"),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_faults_are_refused_with_a_sentence(fault: str) -> None:
    call, sentence = REFUSED[fault]
    kind = TooLarge if fault in ("long", "too many images", "too many files") else MalformedUpload
    with pytest.raises(kind, match=sentence) as caught:
        call()
    assert len(str(caught.value)) < 300


def test_unknown_members_and_parameters_do_not_matter() -> None:
    parameters = {"sequence_id": 4, "priority": "any", "mine": 1.5}
    assert said({"inputs": [{**ZEROS, "x": 1}], "parameters": parameters, "model_name": "x"}).timeout_us == 0


words = st.sampled_from(
    ["id", "inputs", "outputs", "parameters", "name", "datatype", "shape", "data", "image", "UINT8", "BYTES",
     "binary_data_size", "classification", "binary_data", "timeout", "probabilities", "shared_memory_region"]
)  # fmt: skip
leaves = st.none() | st.booleans() | st.integers(-2, 13) | st.integers() | st.floats(allow_nan=False) | words
values = st.recursive(leaves, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(words, inner, max_size=4))
faulty = st.fixed_dictionaries(
    {"name": st.just("image"), "datatype": st.sampled_from(["UINT8", "BYTES"])},
    optional={
        "shape": st.just([1, 2, 2, 3]) | st.just([2]) | values,
        "data": st.just([0] * 12) | st.just(["a", "b"]) | values,
        "parameters": st.fixed_dictionaries({"binary_data_size": st.integers(-1, 13)}) | values,
    },
)
near = st.fixed_dictionaries(
    {"inputs": st.lists(faulty, min_size=1, max_size=2) | values},
    optional={"outputs": values, "parameters": values, "id": values},
)
lengths = st.none() | st.integers(-1, 400) | st.binary(max_size=6)


def survives(body: bytes, json_length: int | bytes | None, spec: TensorSpec) -> None:
    try:
        request = read(body, json_length, spec)
    except RequestError:
        return
    assert 1 <= len(request.images) <= MOST


@given(body=st.binary(max_size=200), json_length=lengths, spec=st.sampled_from([PIXELS, FILES]))
def test_noise_raises_nothing_but_request_errors(body: bytes, json_length: Any, spec: TensorSpec) -> None:
    survives(body, json_length, spec)


@given(request=near | values, rest=st.binary(max_size=14), spec=st.sampled_from([PIXELS, FILES]))
def test_wrong_json_raises_nothing_but_request_errors(request: Any, rest: bytes, spec: TensorSpec) -> None:
    text = json.dumps(request).encode()
    survives(text + rest, len(text), spec)
    survives(text, None, spec)


@given(image=images, cut=st.integers(0, 400), noise=st.binary(max_size=3), shift=st.integers(-3, 3))
def test_damaged_requests_raise_nothing_but_request_errors(image: Any, cut: int, noise: bytes, shift: int) -> None:
    body, length = as_client_says(
        tensor(image, "UINT8", binary=True), outputs=[InferRequestedOutput("probabilities", class_count=2)]
    )
    assert length is not None
    survives(body[:cut] + noise + body[cut + len(noise) :], length, PIXELS)
    survives(body[:cut], length + shift, PIXELS)


@given(body=st.binary(max_size=500))
def test_bodies_are_decompressed(body: bytes) -> None:
    assert decompress(gzip.compress(body), "gzip", len(body)) == body
    assert decompress(zlib.compress(body), "deflate", len(body)) == body
    assert decompress(body, "", 0) == decompress(body, "identity", 0) == body


@given(body=st.binary(max_size=100), coding=st.sampled_from(["gzip", "deflate", "br", "gzip, gzip"]))
def test_decompressing_noise_raises_nothing_but_request_errors(body: bytes, coding: str) -> None:
    with pytest.raises(RequestError):
        decompress(body, coding, 10)


def test_decompression_of_many_blocks_loses_nothing() -> None:
    for body in (bytes(5_000_001), np.random.default_rng(0).bytes(3_000_000)):
        assert decompress(gzip.compress(body, 1), "gzip", len(body)) == body
    with pytest.raises(MalformedUpload):
        decompress(gzip.compress(b"a") + bytes(200_000), "gzip", 1000)


def test_decompression_that_yields_nothing_is_stopped() -> None:
    empty_blocks = bytes.fromhex("7801") + bytes.fromhex("000000ffff") * 20_000
    with pytest.raises(TooLarge, match="takes over 0 s of CPU"):
        decompress(empty_blocks, "deflate", 1000, max_cpu_s=0.0)


def test_decompression_stops_at_the_limit() -> None:
    with pytest.raises(TooLarge):
        decompress(gzip.compress(bytes(1001)), "gzip", 1000)
    with pytest.raises(MalformedUpload):
        decompress(gzip.compress(bytes(1000))[:-1], "gzip", 1000)
    with pytest.raises(MalformedUpload):
        decompress(gzip.compress(bytes(1000)) + b"x", "gzip", 1000)
    with pytest.raises(UnsupportedImage):
        decompress(b"", "br", 1000)
