"""The kinds of files by their first bytes."""

from base64 import b64decode

DATA_URL_BYTES = 100  # of its start, in which the media type ends
OTHER_KINDS = {  # by their first bytes, or those behind a length of four bytes
    b"ftypavif": "AVIF",
    b"ftyphei": "HEIC",
    b"ftypmif1": "HEIC",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"%PDF": "PDF",
    b"<svg": "SVG",
    b"<!doctype html": "HTML",
    b"<html": "HTML",
}


def sniff(data: bytes) -> str | None:
    """The accepted format that the first bytes announce, by its Pillow name, or None."""
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if data.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if data.startswith((b"GIF87a", b"GIF89a")):
        return "GIF"
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return "WEBP"
    if data.startswith(b"BM"):
        return "BMP"
    return None


def sniff_base64(text: bytes) -> str | None:
    """The accepted format of a file whose first bytes came as base64 text, a data URL too, or None."""
    text = text[:DATA_URL_BYTES].partition(b";base64,")[2] if text.startswith(b"data:") else text
    try:
        return sniff(b64decode(text[: 4 * (min(len(text), 32) // 4)], validate=True))
    except ValueError:
        return None


def describe(data: bytes) -> str:
    """What a file is that `sniff` does not accept, for an error."""
    encoded = sniff_base64(data)
    if encoded:
        return f"the file is base64 text of a {encoded} file"
    for start, kind in OTHER_KINDS.items():
        if data[4:12].startswith(start) or data.startswith(start):
            return f"the file is {kind}"
    return "the first bytes are of none of them"
