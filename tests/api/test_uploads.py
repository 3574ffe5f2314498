import asyncio
from collections.abc import Iterator
from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from python_multipart.multipart import MultipartParser

from app.api import uploads
from app.api.uploads import parse_form
from app.errors import MalformedUpload, RequestError, TooLarge, UnsupportedImage
from app.settings import Settings

PIECES = [b"--X", b"\r\n", b"--", b"a", b"X", b'Content-Disposition: form-data; name="file"', b"\r\n\r\n", b" "]
SETTINGS = Settings(max_files=20, max_file_bytes=1000, max_body_bytes=50_000)

names = st.text(st.characters(blacklist_categories=["Cs", "Cc"], blacklist_characters='"\\'), max_size=40)
contents = st.binary(max_size=60) | st.lists(st.sampled_from([b"\r\n", b"--", b"X", b"\r", b"-", b"y"])).map(b"".join)
boundaries = st.sampled_from([b"X", b"----WebKitFormBoundary7MA4YWxkTrZu0gW", b"a'()+_,-./:=?b"])


def encode(boundary: bytes, parts: list[tuple[str, str | None, bytes]]) -> bytes:
    body = b""
    for name, filename, content in parts:
        body += b"--" + boundary + b'\r\nContent-Disposition: form-data; name="' + name.encode() + b'"'
        body += b'; filename="' + filename.encode() + b'"' if filename is not None else b""
        body += b"\r\nContent-Type: image/png\r\n\r\n" + content + b"\r\n"
    return body + b"--" + boundary + b"--\r\n"


def library(body: bytes, boundary: bytes) -> list[bytes] | None:
    """The contents of all parts as python-multipart reads them; None where it refuses."""
    parts: list[bytearray] = []
    ended = []

    def data(chunk: bytes, start: int, end: int) -> None:
        parts[-1].extend(chunk[start:end])

    parser = MultipartParser(
        boundary,
        {
            "on_part_begin": lambda: parts.append(bytearray()),
            "on_part_data": data,
            "on_end": lambda: ended.append(True),
        },
    )
    try:
        parser.write(body)
        parser.finalize()
    except Exception:
        return None
    return [bytes(part) for part in parts] if ended else None


@given(
    boundary=boundaries,
    parts=st.lists(st.tuples(st.sampled_from(["file", "other"]), st.none() | names, contents), max_size=12),
    preamble=st.sampled_from([b"", b"hello\r\n"]),
)
def test_what_was_put_in_a_form_is_read_out_of_it(
    boundary: bytes, parts: list[tuple[str, str | None, bytes]], preamble: bytes
) -> None:
    delimiter = b"\r\n--" + boundary
    parts = [part for part in parts if delimiter not in b"\r\n" + part[2] + b"\r\n"]
    body = preamble + encode(boundary, parts)
    files = [(filename, content) for name, filename, content in parts if name == "file"]
    if not files:
        with pytest.raises(MalformedUpload, match="no part named"):
            parse_form(body, boundary, SETTINGS)
        return
    got = parse_form(body, boundary, SETTINGS)
    assert [(upload.filename, upload.data) for upload in got] == files
    assert [upload.error is not None for upload in got] == [not content for _, content in files]


@given(body=st.lists(st.sampled_from(PIECES), max_size=30).map(b"".join))
@example(b'--X\r\nContent-Disposition: form-data; name="file"\r\n\r\na\r\n--X--')
@example(b'--X\r\nContent-Disposition: form-data; name="file"\r\n\r\n\r\n--Xa\r\n--X--')
def test_whatever_we_read_the_library_reads_alike(body: bytes) -> None:
    """We may refuse more than python-multipart does, never read other contents than it."""
    try:
        got = [upload.data for upload in parse_form(body, b"X", SETTINGS)]
    except RequestError:
        return
    theirs = library(body, b"X")
    if theirs is not None:
        assert all(content in theirs for content in got)


@given(st.binary(max_size=300), boundaries)
def test_noise_is_refused_with_a_clear_error(body: bytes, boundary: bytes) -> None:
    with pytest.raises(MalformedUpload):
        parse_form(body, boundary, SETTINGS)


@pytest.mark.parametrize("boundary", [b"", b"x" * 71, b"a\x00b", b"a\r\nb"])
def test_a_boundary_that_cannot_be_is_refused(boundary: bytes) -> None:
    with pytest.raises(MalformedUpload, match="names no boundary"):
        parse_form(b"--" + boundary + b"--", boundary, SETTINGS)


def test_parts_are_bounded_in_number_and_size() -> None:
    with pytest.raises(TooLarge, match="more than 20 files"):
        parse_form(encode(b"X", [("file", "a", b"x")] * 21), b"X", SETTINGS)
    with pytest.raises(TooLarge, match="more than 100 parts"):
        parse_form(encode(b"X", [("other", None, b"x")] * 101), b"X", SETTINGS)
    with pytest.raises(MalformedUpload):
        parse_form(b"--X\r\n" + b"h: v\r\n" * 2000 + b"\r\nx\r\n--X--", b"X", SETTINGS)
    large, small = parse_form(encode(b"X", [("file", "a", bytes(1001)), ("file", "b", bytes(1000))]), b"X", SETTINGS)
    assert isinstance(large.error, TooLarge)
    assert small.error is None


def test_thousands_of_parts_are_refused_like_a_few_too_many() -> None:
    for name, message in (("file", "more than 20 files"), ("other", "more than 100 parts")):
        with pytest.raises(TooLarge, match=message):
            parse_form(encode(b"X", [(name, "a", b"x")] * 10_000), b"X", SETTINGS)


@given(st.lists(st.sampled_from([b"\r\n--Xa", b"\r\n--X", b"a", b"-", b"\r\n"]), max_size=30).map(b"".join))
def test_delimiters_that_only_begin_like_ours_are_content(noise: bytes) -> None:
    content = noise.replace(b"\r\n--X", b"\r\n--Xa")
    (upload,) = parse_form(encode(b"X", [("file", None, content + b"end")]), b"X", SETTINGS)
    assert upload.data == content + b"end"


def test_a_form_within_a_form_is_just_content() -> None:
    inner = encode(b"Y", [("file", "inner.png", b"x")])
    (upload,) = parse_form(encode(b"X", [("file", "outer", inner)]), b"X", SETTINGS)
    assert (upload.filename, upload.data) == ("outer", inner)


@pytest.mark.parametrize("name", ["../../etc/passwd", "C:\\x\\y.png", "\u202egnp.exe", "a\tb", "x" * 1000, ""])
def test_file_names_are_echoed_and_cut_but_never_used(name: str) -> None:
    (upload,) = parse_form(encode(b"X", [("file", name, b"x")]), b"X", SETTINGS)
    assert upload.filename is not None
    assert len(upload.filename) <= 255


def chunks(*parts: bytes) -> tuple[Iterator[dict[str, object]], list[int]]:
    read: list[int] = []

    def messages() -> Iterator[dict[str, object]]:
        for i, part in enumerate(parts):
            read.append(len(part))
            yield {"type": "http.request", "body": part, "more_body": i < len(parts) - 1}
        yield {"type": "http.disconnect"}

    return messages(), read


def read(messages: Iterator[dict[str, object]], kind: str, length: str = "0") -> list[uploads.Upload]:
    async def receive() -> dict[str, object]:
        return next(messages)

    return uploads.files(asyncio.run(uploads.read(receive, kind, length, SETTINGS)), SETTINGS)


@given(cuts=st.lists(st.integers(1, 400), max_size=8))
def test_a_body_may_come_in_any_pieces(cuts: list[int]) -> None:
    body = encode(b"X", [("file", "a.png", bytes(range(256))), ("file", None, b"second")])
    edges = [0, *sorted({cut for cut in cuts if cut < len(body)}), len(body)]
    messages, _ = chunks(*(body[a:b] for a, b in pairwise(edges)))
    got = read(messages, "multipart/form-data; boundary=X")
    assert [upload.data for upload in got] == [bytes(range(256)), b"second"]


def test_a_declared_length_over_the_limit_is_refused_before_anything_is_read() -> None:
    for length in ("50001", "9" * 5000):
        messages, taken = chunks(b"x")
        with pytest.raises(TooLarge):
            read(messages, "multipart/form-data; boundary=X", length)
        assert taken == []


def test_an_undeclared_body_is_refused_as_soon_as_it_passes_the_limit() -> None:
    messages, taken = chunks(*[bytes(400)] * 100)
    with pytest.raises(TooLarge):
        read(messages, "image/png")
    assert taken == [400] * 3


def test_a_caller_who_leaves_in_mid_body_is_noticed() -> None:
    messages = iter([{"type": "http.request", "body": b"x", "more_body": True}, {"type": "http.disconnect"}])
    with pytest.raises(MalformedUpload, match="ended before it was complete"):
        read(messages, "image/png")


@pytest.mark.parametrize("kind", ["", "text/plain", "application/json", "multipart/mixed; boundary=X", "imagepng"])
def test_other_media_types_are_unsupported(kind: str) -> None:
    messages, _ = chunks(b"x")
    with pytest.raises(UnsupportedImage):
        read(messages, kind)
