"""A request's body into memory, under its limits, and the files in it."""

import re
import zlib
from collections.abc import Iterator
from typing import NamedTuple

from python_multipart.multipart import parse_options_header
from starlette.types import Receive

from app.errors import MalformedUpload, RequestError, TooLarge, UnsupportedImage
from app.settings import Settings

MAX_NAME = 255  # characters of a file name that are echoed
MAX_HEADERS = 8192  # bytes before the content of one part
OTHER_PARTS = 100  # parts of other names that a form may hold besides its files
BOUNDARY = re.compile(rb"[^\x00-\x1f\x7f]{1,70}")  # RFC 2046, but generous with its characters
LINE_ENDS = re.compile(rb"(?=--|[\r \t])")
DISPOSITION = re.compile(rb"^content-disposition:[ \t]*(.*?)\r?$", re.IGNORECASE | re.MULTILINE)
UNSUPPORTED = (
    "Send a multipart/form-data form with parts named file, or the image itself with its image/* content type."
)


class Upload(NamedTuple):
    """One file: its name as the caller sent it (None for a raw body), and its bytes or what is wrong with them."""

    filename: str | None
    data: bytes
    error: RequestError | None = None


class Body(NamedTuple):
    """What a request holds: a multipart form, or one file where there is no boundary."""

    data: bytes
    boundary: bytes | None


async def read(receive: Receive, content_type: str, content_length: str, settings: Settings) -> Body:
    """Raises MalformedUpload, UnsupportedImage (another media type) or TooLarge, as soon as a limit is passed."""
    kind, options = parse_options_header(content_type)
    if kind == b"multipart/form-data":
        body = await read_body(receive, content_length, settings.max_body_bytes)
        return Body(body, options.get(b"boundary", b""))
    if kind.startswith(b"image/") or kind == b"application/octet-stream":
        limit = min(settings.max_file_bytes, settings.max_body_bytes)
        return Body(await read_body(receive, content_length, limit), None)
    raise UnsupportedImage(UNSUPPORTED)


def files(body: Body, settings: Settings) -> list[Upload]:
    """The uploaded files in order: a form's parts named `file`, or the one; raises MalformedUpload or TooLarge."""
    if body.boundary is not None:
        return parse_form(body.data, body.boundary, settings)
    if not body.data:
        raise MalformedUpload("The body is empty.")
    return [Upload(None, body.data)]


async def read_body(receive: Receive, content_length: str, limit: int) -> bytes:
    """The whole body; raises TooLarge as soon as it passes the limit."""
    too_large = f"The body is over {limit} bytes."
    if content_length.isdecimal() and int(content_length[:20]) > limit:
        raise TooLarge(too_large)
    chunks, total, more = [], 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise MalformedUpload("The body ended before it was complete.")
        chunk = message.get("body", b"")
        chunks.append(chunk)
        total += len(chunk)
        if total > limit:
            raise TooLarge(too_large)
        more = message.get("more_body", False)
    return chunks[0] if len(chunks) == 1 else b"".join(chunks)


def inflate(body: bytes, coding: str, limit: int) -> bytes:
    """The body without its content coding; raises TooLarge as soon as it passes the limit."""
    if coding in ("", "identity"):
        return body
    if coding not in ("gzip", "deflate"):
        raise UnsupportedImage("Send the body as it is, or with a Content-Encoding of gzip or deflate.")
    inflater = zlib.decompressobj(zlib.MAX_WBITS | 32)  # reads the head of either
    try:
        content = inflater.decompress(body, limit + 1)
    except zlib.error as error:
        raise MalformedUpload(f"The {coding} data is broken.") from error
    if len(content) > limit:
        raise TooLarge(f"The body inflates to over {limit} bytes.")
    if not inflater.eof or inflater.unused_data:
        raise MalformedUpload(f"The {coding} data is incomplete, or more follows it.")
    return content


def parse_form(body: bytes, boundary: bytes, settings: Settings) -> list[Upload]:
    """The parts named `file` of a multipart form (RFC 7578); raises MalformedUpload or TooLarge."""
    if not BOUNDARY.fullmatch(boundary):
        raise MalformedUpload("The content type of the form names no boundary.")
    uploads: list[Upload] = []
    others = 0
    for headers, begin, end in _parts(body, boundary):
        name, filename = _names(headers)
        if name != b"file":
            others += 1
        elif len(uploads) < settings.max_files:
            uploads.append(upload(filename, body, begin, end, settings.max_file_bytes))
        else:
            raise TooLarge(f"The form has more than {settings.max_files} files.")
        if others > OTHER_PARTS:
            raise TooLarge(f"The form has more than {OTHER_PARTS} parts that are no files.")
    if not uploads:
        raise MalformedUpload('The form has no part named "file".')
    return uploads


def _parts(body: bytes, boundary: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Each part's headers, and where its content begins and ends in the body."""
    delimiter = b"\r\n--" + boundary
    if body.startswith(delimiter[2:]):
        position = len(delimiter) - 2
    else:
        preamble = _next_delimiter(body, delimiter, 0)
        position = preamble + len(delimiter) if preamble >= 0 else -1
    while position >= 0:
        if body.startswith(b"--", position):
            return
        line_end = body.find(b"\r\n", position)
        headers_end = body.find(b"\r\n\r\n", line_end)
        if line_end < 0 or body[position:line_end].strip(b" \t") or not 0 <= headers_end - line_end <= MAX_HEADERS:
            break
        content = headers_end + 4
        end = _next_delimiter(body, delimiter, headers_end + 2)
        if end < 0:
            break
        yield body[line_end:headers_end], content, max(content, end)
        position = end + len(delimiter)
    raise MalformedUpload("The multipart form is broken or has no closing boundary.")


def _next_delimiter(body: bytes, delimiter: bytes, start: int) -> int:
    """Where the next delimiter line begins, or -1. A longer boundary that begins like ours is content."""
    place = body.find(delimiter, start)
    if place < 0 or LINE_ENDS.match(body, place + len(delimiter)):
        return place
    # a body may hold millions that only begin like ours, which a loop would keep the event loop busy with
    genuine = re.compile(re.escape(delimiter) + LINE_ENDS.pattern).search(body, place)
    return genuine.start() if genuine else -1


def _names(headers: bytes) -> tuple[bytes, str | None]:
    """The name and the file name in a part's Content-Disposition."""
    match = DISPOSITION.search(headers)
    if match is None:
        return b"", None
    _, options = parse_options_header(match[1])
    filename = options.get(b"filename")
    return options.get(b"name", b""), None if filename is None else filename.decode("utf-8", "replace")[:MAX_NAME]


def upload(filename: str | None, body: bytes, begin: int, end: int, limit: int) -> Upload:
    """The file that is this part of the body, or what is wrong with its length."""
    if end - begin > limit:
        return Upload(filename, b"", TooLarge(f"The file is over {limit} bytes."))
    if end == begin:
        return Upload(filename, b"", MalformedUpload("The file is empty."))
    return Upload(filename, body[begin:end])
