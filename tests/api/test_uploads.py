import asyncio
import gzip
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.api import uploads
from app.api.parse_thread import ParseThread
from app.api.uploads import Form, FormParser, Upload
from app.errors import ClientDisconnected, MalformedUpload, RequestError, TooLarge, UnsupportedImage
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


def parse(chunks: Sequence[bytes], boundary: bytes = b"X") -> Form:
    parser = FormParser(boundary.decode("latin-1"), SETTINGS)
    for chunk in chunks:
        parser.feed(chunk)
    return parser.close()


def files(chunks: Sequence[bytes]) -> list[Upload]:
    return parse(chunks).files


def outcome(chunks: Sequence[bytes]) -> Form | type[RequestError]:
    """The form, or the kind of its error."""
    try:
        return parse(chunks)
    except RequestError as error:
        return type(error)


@given(
    boundary=boundaries,
    parts=st.lists(st.tuples(st.sampled_from(["file", "other"]), st.none() | names, contents), max_size=12),
    preamble=st.sampled_from([b"", b"hello\r\n"]),
)
def test_encoded_forms_are_parsed(boundary: bytes, parts: list[tuple[str, str | None, bytes]], preamble: bytes) -> None:
    delimiter = b"\r\n--" + boundary
    parts = [part for part in parts if delimiter not in b"\r\n" + part[2] + b"\r\n"]
    body = preamble + encode(boundary, parts)
    expected = [(filename, content) for name, filename, content in parts if name == "file"]
    if not expected:
        with pytest.raises(MalformedUpload, match="no part named"):
            parse([body], boundary)
        return
    got = parse([body], boundary).files
    assert [upload.filename for upload in got] == [filename for filename, _ in expected]
    for upload, (_, content) in zip(got, expected, strict=True):
        assert upload.data == content if content else isinstance(upload.data, MalformedUpload)


@given(body=st.lists(st.sampled_from(PIECES), max_size=30).map(b"".join))
def test_any_form_is_parsed_alike_in_one_chunk_and_in_bytes(body: bytes) -> None:
    assert outcome([body]) == outcome([body[i : i + 1] for i in range(len(body))])


@given(st.binary(max_size=300), boundaries)
def test_noise_is_malformed(body: bytes, boundary: bytes) -> None:
    with pytest.raises(MalformedUpload):
        parse([body], boundary)


@pytest.mark.parametrize("boundary", [b"", b"x" * 71, b"a\x00b", b"a\r\nb"])
def test_invalid_boundary_is_refused(boundary: bytes) -> None:
    with pytest.raises(MalformedUpload, match="no valid boundary"):
        parse([b"--" + boundary + b"--"], boundary)


def test_parts_are_bounded_in_number_and_size() -> None:
    with pytest.raises(TooLarge, match="more than 20 files"):
        parse([encode(b"X", [("file", "a", b"x")] * 21)])
    with pytest.raises(TooLarge, match="more than 100 parts"):
        parse([encode(b"X", [("other", None, b"x")] * 101)])
    with pytest.raises(MalformedUpload):
        parse([b"--X\r\n" + b"h: v\r\n" * 2000 + b"\r\nx\r\n--X--"])
    large, small = files([encode(b"X", [("file", "a", bytes(1001)), ("file", "b", bytes(1000))])])
    assert isinstance(large.data, TooLarge)
    assert small.data == bytes(1000)


@pytest.mark.slow
def test_thousands_of_parts_are_refused() -> None:
    for name, message in (("file", "more than 20 files"), ("other", "more than 100 parts")):
        with pytest.raises(TooLarge, match=message):
            parse([encode(b"X", [(name, "a", b"x")] * 10_000)])


def test_longer_boundary_is_refused_at_once() -> None:
    body = encode(b"X", [("file", None, b"\r\n--Xa" * 300_000)])
    with pytest.raises(MalformedUpload, match="broken"):
        parse([body])


def test_nested_form_is_content() -> None:
    inner = encode(b"Y", [("file", "inner.png", b"x")])
    (upload,) = files([encode(b"X", [("file", "outer", inner)])])
    assert (upload.filename, upload.data) == ("outer", inner)


@pytest.mark.parametrize("name", ["../../etc/passwd", "C:\\x\\y.png", "\u202egnp.exe", "a\tb", "x" * 1000, ""])
def test_file_names_are_returned_and_cut(name: str) -> None:
    (upload,) = files([encode(b"X", [("file", name, b"x")])])
    assert upload.filename is not None
    assert len(upload.filename) <= 255


def messages(*parts: bytes) -> tuple[Iterator[dict[str, object]], list[int]]:
    """ASGI messages of a body, and the sizes of those that were received."""
    received: list[int] = []

    def generate() -> Iterator[dict[str, object]]:
        for i, part in enumerate(parts):
            received.append(len(part))
            yield {"type": "http.request", "body": part, "more_body": i < len(parts) - 1}

    return generate(), received


def read(source: Iterator[dict[str, object]], kind: str, **headers: str) -> uploads.Form:
    async def receive() -> dict[str, object]:
        message = next(source, None)
        return message or await asyncio.Future()  # the client waits for its response

    encoded = {name.replace("_", "-").encode(): value.encode() for name, value in headers.items()}
    with closing(ParseThread()) as thread:
        form, _ = asyncio.run(uploads.read(receive, {b"content-type": kind.encode(), **encoded}, SETTINGS, thread))
    return form


@given(cuts=st.lists(st.integers(1, 400), max_size=8))
def test_body_may_arrive_in_any_chunks(cuts: list[int]) -> None:
    body = encode(b"X", [("file", "a.png", bytes(range(256))), ("file", None, b"second")])
    edges = [0, *sorted({cut for cut in cuts if cut < len(body)}), len(body)]
    source, _ = messages(*(body[a:b] for a, b in pairwise(edges)))
    form = read(source, "multipart/form-data; boundary=X")
    assert [upload.data for upload in form.files] == [bytes(range(256)), b"second"]


@pytest.mark.parametrize("length", ["50001", "9" * 5000])
def test_declared_length_over_limit_is_refused_unread(length: str) -> None:
    source, received = messages(b"x")
    with pytest.raises(TooLarge):
        read(source, "multipart/form-data; boundary=X", content_length=length)
    assert received == []


def test_undeclared_body_is_refused_when_it_passes_limit() -> None:
    source, received = messages(*[bytes(400)] * 100)
    with pytest.raises(TooLarge):
        read(source, "image/png")
    assert received == [400] * 3


def test_disconnect_within_body_is_reported() -> None:
    source = iter([{"type": "http.request", "body": b"x", "more_body": True}, {"type": "http.disconnect"}])
    with pytest.raises(ClientDisconnected):
        read(source, "image/png")


@pytest.mark.parametrize("kind", ["", "text/plain", "application/json", "multipart/mixed; boundary=X", "imagepng"])
def test_other_media_types_are_unsupported(kind: str) -> None:
    source, _ = messages(b"x")
    with pytest.raises(UnsupportedImage):
        read(source, kind)


@pytest.mark.parametrize("coding", ["gzip", "deflate", "identity"])
def test_content_encoding_is_decoded(coding: str) -> None:
    pack: dict[str, Callable[[bytes], bytes]] = {"gzip": gzip.compress, "deflate": zlib.compress, "identity": bytes}
    body = encode(b"X", [("file", "a.png", b"first"), ("file", None, b"second")])
    form = read(messages(pack[coding](body))[0], "multipart/form-data; boundary=X", content_encoding=coding)
    assert [upload.data for upload in form.files] == [b"first", b"second"]
    raw = read(messages(pack[coding](b"raw"))[0], "image/png", content_encoding=coding)
    assert raw.files == [Upload(None, b"raw")]


def test_disconnect_before_decompression_is_reported() -> None:
    body = {"type": "http.request", "body": gzip.compress(b"x" * 10_000), "more_body": False}
    with pytest.raises(ClientDisconnected):
        read(iter([body, {"type": "http.disconnect"}]), "image/png", content_encoding="gzip")


def test_decompression_bomb_is_refused() -> None:
    with pytest.raises(TooLarge, match="decompressed"):
        read(messages(gzip.compress(bytes(50_001)))[0], "multipart/form-data; boundary=X", content_encoding="gzip")
    with pytest.raises(UnsupportedImage, match="gzip or deflate"):
        read(messages(b"x")[0], "image/png", content_encoding="br")


def test_form_fields_are_returned_and_bounded() -> None:
    form = parse([encode(b"X", [("top_k", None, b"5"), ("file", None, b"x"), ("note", None, bytes(1001))])])
    assert form.fields == {"top_k": "5", "note": ""}


@pytest.mark.parametrize("name", ["image", "file[]", "File"])
def test_form_without_file_names_the_parts_it_has(name: str) -> None:
    with pytest.raises(MalformedUpload, match=re.escape(f'it has "{name}"')):
        parse([encode(b"X", [(name, "a.png", b"x")])])


@pytest.mark.parametrize(
    ("disposition", "filename"),
    [
        ("filename=\"cat.png\"; filename*=UTF-8''na%C3%AFve.png", "na\u00efve.png"),
        ("filename*=utf-8'en'%e2%82%ac%20rates.png", "\u20ac rates.png"),
        ("filename*=ISO-8859-1''na%EFve.png", "na\u00efve.png"),
        ('filename="na\u00efve.png"', "na\u00efve.png"),
        ("filename=cat.png", "cat.png"),
        ('filename="C:\\\\cat.png"', "cat.png"),
    ],
)
def test_file_names_of_all_clients_are_decoded(disposition: str, filename: str) -> None:
    body = f'--X\r\nContent-Disposition: form-data; name="file"; {disposition}\r\n\r\nx\r\n--X--'.encode()
    assert parse([body]).files[0].filename == filename
