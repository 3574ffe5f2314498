"""The files in a request's body: a multipart form, or one raw file."""

import asyncio
import io
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple
from urllib.parse import unquote

from multipart import MultipartError, MultipartSegment, ParserLimitReached, PushMultipartParser, parse_options_header
from starlette.types import Receive

from app.api.bodies import Body, Headers, chunks, content_coding, decompress, read_body
from app.api.disconnect import run_until_disconnect
from app.api.parse_thread import ParseThread
from app.errors import MalformedUpload, RequestError, TooLarge, UnsupportedImage
from app.inference.pipeline import Deadline
from app.settings import Settings

MAX_NAME = 255  # characters of a file name that are returned
MAX_EXTENDED_NAME = 12 * MAX_NAME  # of them, as %XX for each of up to 4 bytes a character
MAX_HEADER = 8192  # bytes of one header line of a part
OTHER_PARTS = 100  # parts besides the files that a form may hold
MAX_FIELD = 1000  # bytes of a form field's value
SLICE = 16_384  # bytes of a form that are parsed before the clock is checked: 2 ms of part headers at most
PARSE_S = 0.001  # after which other requests have the event loop
EXTENDED_NAME = re.compile(r"filename\*\s*=\s*(utf-8|iso-8859-1)'[^']*'([^\s;]+)", re.IGNORECASE)
UNSUPPORTED = (
    "Send a multipart/form-data form with parts named file, or the image itself with its image/* content type."
)


class Upload(NamedTuple):
    """One file: its name as sent (None for a raw body), and its bytes or what is wrong with them."""

    filename: str | None
    data: bytes | RequestError


class Form(NamedTuple):
    """The files of a request in order, and the values of its other fields by name."""

    files: list[Upload]
    fields: dict[str, str]


async def read(
    receive: Receive, headers: Headers, settings: Settings, parse_thread: ParseThread
) -> tuple[Form, Deadline]:
    """Reads a multipart form or one raw file. The deadline starts when the body is complete.

    The thread decompresses a body with a Content-Encoding. Raises MalformedUpload, UnsupportedImage (another media
    type), TooLarge as soon as a limit is passed, ClientDisconnected, and what `ParseThread.run` raises.
    """
    kind, options = parse_options_header(headers.get(b"content-type", b"").decode("latin-1"))
    if kind == "multipart/form-data":
        parser = FormParser(options.get("boundary", ""), settings)
        if content_coding(headers):
            body, deadline = await _whole_body(receive, headers, settings.max_body_bytes, settings, parse_thread)
            await _feed(parser, body)
        else:
            async for chunk in chunks(receive, headers, settings.max_body_bytes):
                await _feed(parser, chunk)
            deadline = Deadline.after(settings.request_timeout_s)
        return parser.close(), deadline
    if kind.startswith("image/") or kind == "application/octet-stream":
        limit = min(settings.max_file_bytes, settings.max_body_bytes)
        body, deadline = await _whole_body(receive, headers, limit, settings, parse_thread)
        if not body:
            raise MalformedUpload("The body is empty.")
        return Form([Upload(None, bytes(body))], {}), deadline
    raise UnsupportedImage(UNSUPPORTED)


async def _whole_body(
    receive: Receive, headers: Headers, limit: int, settings: Settings, parse_thread: ParseThread
) -> tuple[Body, Deadline]:
    """The body without its content coding; the limit applies before and after."""
    body = await read_body(receive, headers, limit)
    deadline = Deadline.after(settings.request_timeout_s)
    if coding := content_coding(headers):
        call = partial(decompress, body, coding, limit)
        body = await run_until_disconnect(receive, parse_thread.run(call, deadline))
    return body, deadline


async def _feed(parser: "FormParser", data: Body) -> None:
    stop = time.monotonic() + PARSE_S
    for start in range(0, len(data), SLICE):
        parser.feed(bytes(data[start : start + SLICE]))
        if time.monotonic() > stop:
            await asyncio.sleep(0)
            stop = time.monotonic() + PARSE_S


class FormParser:
    """Collects the parts of a multipart form (RFC 7578) that is fed in chunks.

    Raises MalformedUpload, or TooLarge for too many files or parts. A file that is empty or over max_file_bytes has its
    own error.
    """

    def __init__(self, boundary: str, settings: Settings) -> None:
        self._settings = settings
        self._files: list[Upload] = []
        self._fields: dict[str, str] = {}
        self._part: MultipartSegment | None = None
        self._payload = io.BytesIO()  # joining 10 MB would hold the event loop for 6 ms
        self._size = 0
        self._others = 0
        if not 1 <= len(boundary) <= 70 or not boundary.isprintable():  # RFC 2046, section 5.1.1
            raise MalformedUpload("The content type of the form has no valid boundary.")
        self._parser = PushMultipartParser(
            boundary.encode("latin-1", "replace"), max_header_size=MAX_HEADER, header_charset="latin-1"
        )

    def feed(self, chunk: bytes) -> None:
        if not chunk or self._parser.closed:
            return
        with _as_request_errors():
            for event in self._parser.parse(chunk):
                if isinstance(event, MultipartSegment):
                    self._start(event)
                elif event is None:
                    self._finish()
                else:
                    self._add(event)

    def close(self) -> Form:
        """The files and fields; raises MalformedUpload if the form is incomplete or has no file."""
        with _as_request_errors():
            self._parser.close()
        if not self._files:
            names = ", ".join(f'"{name[:50]}"' for name in list(self._fields)[:5]) or "no part"
            raise MalformedUpload(f'The form has no part named "file"; it has {names}.')
        return Form(self._files, self._fields)

    def _start(self, part: MultipartSegment) -> None:
        self._part, self._payload, self._size = part, io.BytesIO(), 0
        if part.name != "file":
            self._others += 1
            if self._others > OTHER_PARTS:
                raise TooLarge(f"The form has more than {OTHER_PARTS} parts that are not files.")
        elif len(self._files) == self._settings.max_files:
            raise TooLarge(f"The form has more than {self._settings.max_files} files.")

    def _add(self, payload: bytes) -> None:
        assert self._part is not None
        self._size += len(payload)
        if self._size <= (self._settings.max_file_bytes if self._part.name == "file" else MAX_FIELD):
            self._payload.write(payload)
        else:
            self._payload = io.BytesIO()  # what is refused holds no memory

    def _finish(self) -> None:
        assert self._part is not None
        data = self._payload.getvalue()
        if self._part.name == "file":
            self._files.append(Upload(_filename(self._part), checked(data, self._size, self._settings.max_file_bytes)))
        else:
            self._fields[str(self._part.name)] = data.decode("utf-8", "replace")
        self._part, self._payload = None, io.BytesIO()


def checked(data: bytes, size: int, limit: int) -> bytes | RequestError:
    """The file's bytes, or what is wrong with its size."""
    if size > limit:
        return TooLarge(f"The file has over {limit} bytes.")
    return data or MalformedUpload("The file is empty.")


def _filename(part: MultipartSegment) -> str | None:
    """The file name; `filename*` (RFC 5987), which some clients send beside it, wins."""
    extended = EXTENDED_NAME.search(part.header("Content-Disposition", ""))
    if extended:
        name = unquote(extended[2][:MAX_EXTENDED_NAME], extended[1], "replace")
    elif part.filename is None:
        return None
    else:
        name = part.filename.encode("latin-1").decode("utf-8", "replace")
    return name[:MAX_NAME]


@contextmanager
def _as_request_errors() -> Iterator[None]:
    try:
        yield
    except ParserLimitReached as error:
        raise MalformedUpload("A part of the form has too many or too long headers.") from error
    except MultipartError as error:
        raise MalformedUpload(f"The multipart form is broken: {error}.") from error
