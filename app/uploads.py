"""A request's body into memory, under its limits, while it arrives."""

from collections.abc import AsyncIterator
from typing import NamedTuple

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import ClientDisconnect, Request

from app.errors import MalformedUpload, RequestError, TooLarge, UnsupportedImage
from app.settings import Settings

FIELD = b"file"
MAX_NAME = 255  # characters of a file name that are echoed


class Upload(NamedTuple):
    """One file: its name as the caller sent it (None for a raw body), and its bytes or what was wrong with them."""

    filename: str | None
    data: bytes
    error: RequestError | None = None


async def read(request: Request, settings: Settings) -> list[Upload]:
    """The uploaded files in order: parts named `file` of a multipart form, or the raw body as one file.

    Raises MalformedUpload, UnsupportedImage (another media type) or TooLarge, as soon as a limit is passed.
    """
    kind, options = parse_options_header(request.headers.get("content-type", ""))
    body = _limited(request, settings.max_body_bytes)
    if kind == b"multipart/form-data":
        uploads = await _read_form(body, options.get(b"boundary", b""), settings)
        if not uploads:
            raise MalformedUpload('The form has no part named "file".')
        return uploads
    if kind.startswith(b"image/") or kind == b"application/octet-stream":
        return [await _read_raw(body, settings.max_file_bytes)]
    raise UnsupportedImage(
        "Send a multipart/form-data form with parts named file, or the image itself with its image/* content type."
    )


async def _limited(request: Request, max_bytes: int) -> AsyncIterator[bytes]:
    too_large = TooLarge(f"The body is over {max_bytes} bytes.")
    declared = request.headers.get("content-length", "0")
    if declared.isdecimal() and int(declared) > max_bytes:
        raise too_large
    total = 0
    try:
        async for chunk in request.stream():
            total += len(chunk)
            if total > max_bytes:
                raise too_large
            yield chunk
    except ClientDisconnect as error:
        raise MalformedUpload("The body ended before it was complete.") from error


async def _read_raw(body: AsyncIterator[bytes], max_bytes: int) -> Upload:
    data = bytearray()
    async for chunk in body:
        data += chunk
        if len(data) > max_bytes:
            raise TooLarge(f"The file is over {max_bytes} bytes.")
    if not data:
        raise MalformedUpload("The body is empty.")
    return Upload(None, bytes(data))


async def _read_form(body: AsyncIterator[bytes], boundary: bytes, settings: Settings) -> list[Upload]:
    form = _Form(settings)
    try:
        parser = MultipartParser(boundary, form.callbacks())  # type: ignore[arg-type]
        async for chunk in body:
            parser.write(chunk)
        parser.finalize()
    except (FormParserError, UnicodeDecodeError) as error:
        raise MalformedUpload(f"The multipart form cannot be parsed: {error}.") from error
    if not form.complete:
        raise MalformedUpload("The multipart form has no closing boundary.")
    return form.uploads


class _Form:
    """Collects the parser's events."""

    def __init__(self, settings: Settings) -> None:
        self.uploads: list[Upload] = []
        self.complete = False
        self._settings = settings
        self._header_name = bytearray()
        self._header_value = bytearray()
        self._begin()

    def callbacks(self) -> dict[str, object]:
        return {
            "on_part_begin": self._begin,
            "on_header_field": lambda data, start, end: self._header_name.extend(data[start:end]),
            "on_header_value": lambda data, start, end: self._header_value.extend(data[start:end]),
            "on_header_end": self._header,
            "on_part_data": self._data,
            "on_part_end": self._end,
            "on_end": self._finish,
        }

    def _begin(self) -> None:
        self._wanted = False
        self._filename: str | None = None
        self._content = bytearray()
        self._too_large = False

    def _header(self) -> None:
        if self._header_name.lower() == b"content-disposition":
            _, options = parse_options_header(bytes(self._header_value))
            self._wanted = options.get(b"name") == FIELD
            name = options.get(b"filename")
            self._filename = name.decode("utf-8", "replace")[:MAX_NAME] if name is not None else None
        self._header_name.clear()
        self._header_value.clear()

    def _data(self, data: bytes, start: int, end: int) -> None:
        if not self._wanted or self._too_large:
            return
        if len(self._content) + end - start > self._settings.max_file_bytes:
            self._too_large = True
            self._content.clear()
        else:
            self._content += memoryview(data)[start:end]

    def _end(self) -> None:
        if not self._wanted:
            return
        if len(self.uploads) == self._settings.max_files:
            raise TooLarge(f"The form has more than {self._settings.max_files} files.")
        error: RequestError | None = None
        if self._too_large:
            error = TooLarge(f"The file is over {self._settings.max_file_bytes} bytes.")
        elif not self._content:
            error = MalformedUpload("The file is empty.")
        self.uploads.append(Upload(self._filename, bytes(self._content), error))

    def _finish(self) -> None:
        self.complete = True
