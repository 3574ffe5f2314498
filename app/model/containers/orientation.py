"""The orientation of a picture in EXIF and XMP metadata, read with bounded work."""

import re
import struct
import zlib

UPRIGHT = 1
ORIENTATION_TAG = 0x0112  # TIFF 6.0, section 8
MAX_ENTRIES = 512  # of a directory; a camera's first one has about 15, sorted by tag
MAX_TEXT_BYTES = 1 << 18  # of metadata that is inflated or searched
INTEGER_TYPES = {1: "B", 3: "H", 4: "I"}
XMP_ORIENTATION = re.compile(rb"tiff:Orientation(?:=\"|>)([1-8])")


def from_exif(exif: bytes) -> int | None:
    """The orientation of a TIFF structure's first directory, or None. Never raises."""
    tiff = exif.removeprefix(b"Exif\0\0")
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    if order is None:
        return None
    try:
        (start,) = struct.unpack_from(order + "I", tiff, 4)
        (entries,) = struct.unpack_from(order + "H", tiff, start)
        for place in range(start + 2, start + 2 + 12 * min(entries, MAX_ENTRIES), 12):
            tag, kind = struct.unpack_from(order + "HH", tiff, place)
            if tag == ORIENTATION_TAG and kind in INTEGER_TYPES:
                (value,) = struct.unpack_from(order + INTEGER_TYPES[kind], tiff, place + 8)
                return value if 1 <= value <= 8 else None
    except struct.error:
        return None
    return None


def from_xmp(packet: bytes) -> int | None:
    """The orientation that an XMP packet gives, or None."""
    found = XMP_ORIENTATION.search(packet, 0, MAX_TEXT_BYTES)
    return int(found[1]) if found else None


def from_raw_profile(text: bytes) -> int | None:
    """The orientation of ImageMagick's text form of EXIF: a name, a length and hexadecimal lines."""
    try:
        return from_exif(bytes.fromhex(text[:MAX_TEXT_BYTES].split(b"\n", 3)[3].decode("ascii")))  # skips line ends
    except (ValueError, IndexError):
        return None


def inflated(deflated: bytes) -> bytes:
    """At most MAX_TEXT_BYTES of a zlib stream; empty where it is broken."""
    try:
        return zlib.decompressobj().decompress(deflated, MAX_TEXT_BYTES)
    except zlib.error:
        return b""
