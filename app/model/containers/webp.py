"""WebP files: RFC 9649."""

import struct
from collections.abc import Iterator

from PIL import WebPImagePlugin

from app.errors import UndecodableImage
from app.model.containers import orientation, vp8l
from app.model.containers.container import Container, Essential

CHUNK = struct.Struct("<4sI")
FIRST_CHUNK = 12
FRAME_HEADER = 16  # bytes of an ANMF chunk before its own chunks
MAX_CHUNKS = 1000
MAX_GROUPS = 4096  # of prefix codes: 23 MB; libwebp's encoder writes 2,600 at most
WORK_PER_PIXEL = 3.3  # libwebp's animation decoder and Pillow hold four copies of 4 bytes a pixel


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
        return int(WORK_PER_PIXEL * self.width * self.height)

    def essential(self, work_limit: int) -> Essential:
        if self.width * self.height > 16 * MAX_GROUPS:  # a group has 4 x 4 pixels at least
            groups = sum(self._groups(FIRST_CHUNK, len(self.data), self.width, self.height))
            if groups > MAX_GROUPS:
                raise UndecodableImage(
                    f"The WebP has up to {groups} groups of prefix codes; at most {MAX_GROUPS} are accepted."
                )
        return Essential([self.data], self._orientation() if self._extended else orientation.UPRIGHT)

    def _groups(self, start: int, end: int, width: int, height: int) -> Iterator[int]:
        """Groups of prefix codes of each lossless stream of the picture or of an animation's first frame."""
        view = memoryview(self.data)
        for kind, place, stop in self._chunks(start, end):
            if kind == b"VP8L":
                yield vp8l.count_groups(view[place:stop])
            elif kind == b"ALPH":
                yield vp8l.count_alpha_groups(view[place:stop], width, height)
            elif kind == b"ANMF":
                low_w, high_w, low_h, high_h = struct.unpack_from("<HBHB", self.data, place + 6)
                size = (low_w | high_w << 16) + 1, (low_h | high_h << 16) + 1
                yield from self._groups(place + FRAME_HEADER, min(stop, end), *size)
                return

    def _chunks(self, place: int, end: int) -> Iterator[tuple[bytes, int, int]]:
        """Kind, start and end of the content of each chunk. Raises UndecodableImage past MAX_CHUNKS."""
        for _ in range(MAX_CHUNKS):
            if place + CHUNK.size > end:
                return
            kind, length = CHUNK.unpack_from(self.data, place)
            start = place + CHUNK.size
            yield kind, start, start + length
            place = start + length + (length & 1)
        raise UndecodableImage(f"The WebP has more than {MAX_CHUNKS} chunks.")

    def _orientation(self) -> int:
        """From the first EXIF chunk or the first XMP chunk."""
        metadata: dict[bytes, bytes] = {}
        for kind, start, end in self._chunks(FIRST_CHUNK, len(self.data)):
            if kind in (b"EXIF", b"XMP ") and kind not in metadata:
                metadata[kind] = self.data[start : min(end, start + orientation.MAX_TEXT_BYTES)]
        exif = orientation.from_exif(metadata.get(b"EXIF", b""))
        return exif or orientation.from_xmp(metadata.get(b"XMP ", b"")) or orientation.UPRIGHT
