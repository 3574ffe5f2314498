"""Image files that the command line names: single ones, folders, standard input."""

import os
import sys
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from app.errors import RequestError, TooLarge, UndecodableImage
from app.inference.decoding import File

STDIN = "-"
SUFFIXES = (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".dib", ".gif")
CHUNK_BYTES = 32_000_000


class Unreadable(UndecodableImage):
    type, title = "unreadable-file", "The file cannot be read"


class Source(NamedTuple):
    """A file and its content. Bytes of the name that are not UTF-8 are surrogates, as Python's os module has them."""

    name: str
    file: File


def find(paths: Iterable[str]) -> Iterator[str]:
    """The paths themselves; for a folder the images in it and below it by their suffix, in sorted order.

    A folder without images is found itself, so that it is reported. Links to folders are not followed.
    """
    for path in paths:
        if path != STDIN and os.path.isdir(path):
            images = list(_images(path))
            yield from images or [path]
        else:
            yield path


def _images(folder: str) -> Iterator[str]:
    for parent, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names):
            if name.lower().endswith(SUFFIXES) and not name.startswith("."):
                yield os.path.join(parent, name)


def chunks(paths: Iterable[str], max_files: int, max_file_bytes: int) -> Iterator[list[Source]]:
    """The files in order, at most max_files and about CHUNK_BYTES at once."""
    chunk: list[Source] = []
    size = 0
    for path in paths:
        source = Source(path, read(path, max_file_bytes))
        chunk.append(source)
        size += len(source.file) if isinstance(source.file, bytes) else 0
        if len(chunk) == max_files or size >= CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def read(path: str, max_bytes: int) -> bytes | RequestError:
    """The content, or why there is none."""
    try:
        if path == STDIN:
            data = sys.stdin.buffer.read(max_bytes + 1)
        elif os.path.isdir(path):
            return Unreadable("The folder has no images.")
        else:
            with open(path, "rb") as file:
                data = file.read(max_bytes + 1)
    except (OSError, ValueError) as error:  # ValueError: a null character in the name
        return Unreadable(f"{getattr(error, 'strerror', None) or error}.")
    return data if len(data) <= max_bytes else TooLarge(f"The file has more than {max_bytes} bytes.")
