"""WebP files: RFC 9649."""

import struct

from PIL import WebPImagePlugin

from app.model.containers import orientation
from app.model.containers.container import Container, Essential

CHUNK = struct.Struct("<4sI")
FIRST_CHUNK = 12
MAX_CHUNKS = 1000  # in which metadata is looked for
WORK_PER_PIXEL = 3  # libwebp's animation decoder and Pillow hold four copies of 4 bytes a pixel


class WebP(Container):
    """Lossy (VP8), lossless (VP8L) or extended (VP8X); of an animation the first frame on its canvas."""

    kind = "WEBP"
    plugin = WebPImagePlugin.WebPImageFile

    def __init__(self, data: bytes) -> None:
        self.data = data
        kind, _ = CHUNK.unpack_from(data, FIRST_CHUNK)
        self._extended = kind == b"VP8X"
        if self._extended:
            _, low_w, high_w, low_h, high_h = struct.unpack_from("<IHBHB", data, 20)
            self.width, self.height = (low_w | high_w << 16) + 1, (low_h | high_h << 16) + 1
        elif kind == b"VP8L" and data[20] == 0x2F:
            (bits,) = struct.unpack_from("<I", data, 21)
            self.width, self.height = (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
        elif kind == b"VP8 " and data[23:26] == b"\x9d\x01\x2a":
            width, height = struct.unpack_from("<HH", data, 26)
            self.width, self.height = width & 0x3FFF, height & 0x3FFF
        else:
            raise ValueError("no picture")

    @property
    def description(self) -> str:
        return "WebP"

    def work(self, size: int) -> int:
        return WORK_PER_PIXEL * self.width * self.height

    def essential(self, work_limit: int) -> Essential:
        return Essential([self.data], self._orientation() if self._extended else orientation.UPRIGHT)

    def _orientation(self) -> int:
        """From the first EXIF chunk or the first XMP chunk."""
        metadata: dict[bytes, bytes] = {}
        place = FIRST_CHUNK
        for _ in range(MAX_CHUNKS):
            if place + CHUNK.size > len(self.data):
                break
            kind, length = CHUNK.unpack_from(self.data, place)
            start = place + CHUNK.size
            if kind in (b"EXIF", b"XMP ") and kind not in metadata:
                metadata[kind] = self.data[start : start + min(length, orientation.MAX_TEXT_BYTES)]
            place = start + length + (length & 1)
        exif = orientation.from_exif(metadata.get(b"EXIF", b""))
        return exif or orientation.from_xmp(metadata.get(b"XMP ", b"")) or orientation.UPRIGHT
