"""PNG files: ISO/IEC 15948."""

import struct
from collections.abc import Iterator

from PIL import PngImagePlugin

from app.errors import TooLarge, UndecodableImage
from app.model.containers import orientation
from app.model.containers.container import Container, Essential

SIGNATURE = b"\x89PNG\r\n\x1a\n"
HEADER = struct.Struct(">I4sIIBBBBB")
CHUNK = struct.Struct(">I4s")
FIRST_CHUNK = 33  # behind the signature and IHDR
END = b"\0\0\0\0" + b"\0\0\0\0IEND\xae\x42\x60\x82"  # a check sum that Pillow does not read, and the last chunk
CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # by colour type
RAW_EXIF, XMP = b"Raw profile type exif", b"XML:com.adobe.xmp"
KEYWORD_BYTES = 80  # with the zero byte behind it
MAX_CHUNKS = 10_000  # a file of 10 MB with libpng's IDAT of 8 kB has 1,280
BITS_PER_UNIT = 14  # of a pixel; 14.5 megapixels of 24 bits take 0.3 s where the first 30 MB are random bits
CONVERTED = 1.6  # units at least of a pixel that is not the decoder's RGB or greyscale
KEY_BITS = 8  # by which a colour key widens a pixel
MAX_EXPANSION = 1.25  # of rows by deflate; its fixed codes write 9 bits for 8
FREE_BYTES = 65_536  # of compressed data, whatever the rows need


class Png(Container):
    """Text, profiles and further frames are dropped unread; all IDAT chunks become one."""

    kind = "PNG"
    plugin = PngImagePlugin.PngImageFile

    def __init__(self, data: bytes) -> None:
        length, kind, self.width, self.height, self.bit_depth, colour, *_ = HEADER.unpack_from(data, len(SIGNATURE))
        if kind == b"CgBI":
            raise UndecodableImage("The PNG is in Apple's format for iOS (CgBI), which no standard decoder reads.")
        if (length, kind) != (13, b"IHDR") or colour not in CHANNELS:
            raise ValueError("no IHDR")
        self.data = data
        self._bits = self.bit_depth * CHANNELS[colour]
        self._is_plain = colour == 2 or (colour == 0 and self.bit_depth <= 8)

    @property
    def description(self) -> str:
        return f"{self._bits}-bit PNG"

    def work(self, size: int) -> int:
        return self._work(self._bits, self._is_plain)

    def essential(self, work_limit: int) -> Essential:
        length, kind = CHUNK.unpack_from(self.data, FIRST_CHUNK)
        if kind == b"IDAT" and FIRST_CHUNK + 24 + length == len(self.data):
            self._check(work_limit, length, has_key=False)
            return Essential([self.data], orientation.UPRIGHT)  # one IDAT and IEND, as most encoders write a small file
        view = memoryview(self.data)
        palette: dict[bytes, memoryview] = {}
        pixels: list[memoryview] = []
        metadata: dict[bytes, tuple[int, int]] = {}
        for kind, start, end in self._chunks():
            if kind == b"IDAT":
                pixels.append(view[start:end])
            elif kind in (b"PLTE", b"tRNS"):
                palette.setdefault(kind, view[start - 8 : end + 4])
            elif kind in (b"eXIf", b"iTXt", b"zTXt", b"tEXt"):
                name = kind if kind == b"eXIf" else self.data[start : start + KEYWORD_BYTES].partition(b"\0")[0]
                metadata.setdefault(name, (start, end))
        self._check(work_limit, sum(map(len, pixels)), has_key=b"tRNS" in palette and self._is_plain)
        header = CHUNK.pack(sum(map(len, pixels)), b"IDAT")
        head = b"".join([view[:FIRST_CHUNK], *palette.values(), header])
        return Essential([head, *pixels, END], self._orientation(metadata))

    def _work(self, bits: int, is_plain: bool) -> int:
        return int(self.width * self.height * max(1.0 if is_plain else CONVERTED, bits / BITS_PER_UNIT))

    def _check(self, work_limit: int, compressed: int, has_key: bool) -> None:
        """Raises for a colour key in a picture too large for one, and for data that cannot all be pixels."""
        work = self._work(self._bits + KEY_BITS, is_plain=False) if has_key else 0
        if work > work_limit:
            pixels = self.width * self.height
            raise TooLarge(
                f"The image has {self.width} x {self.height} pixels; at most {pixels * work_limit // work} of a PNG "
                "with a transparent colour are accepted."
            )
        rows = self.height * (self.width * self._bits // 8 + 16)  # with the ends of an interlaced picture's rows
        if compressed > MAX_EXPANSION * rows + FREE_BYTES:
            raise UndecodableImage("The PNG has far more compressed data than its pixels need.")

    def _chunks(self) -> Iterator[tuple[bytes, int, int]]:
        """Kind, start and end of the content of each chunk behind IHDR, up to IEND or the end of the bytes."""
        data, place, last = self.data, FIRST_CHUNK, len(self.data) - 8
        for _ in range(MAX_CHUNKS):
            if place > last:
                return
            length, kind = CHUNK.unpack_from(data, place)
            if kind == b"IEND":
                return
            yield kind, place + 8, place + 8 + length
            place += 12 + length
        raise UndecodableImage(f"The PNG has more than {MAX_CHUNKS} chunks.")

    def _orientation(self, metadata: dict[bytes, tuple[int, int]]) -> int:
        """From the first eXIf chunk, ImageMagick's raw EXIF profile or XMP packet, in this order."""
        found = None
        if b"eXIf" in metadata:
            start, end = metadata[b"eXIf"]
            found = orientation.from_exif(self.data[start : min(end, start + orientation.MAX_TEXT_BYTES)])
        if RAW_EXIF in metadata:
            found = found or orientation.from_raw_profile(self._text(*metadata[RAW_EXIF]))
        if XMP in metadata:
            found = found or orientation.from_xmp(self._text(*metadata[XMP]))
        return found or orientation.UPRIGHT

    def _text(self, start: int, end: int) -> bytes:
        """The start of the text of a tEXt, zTXt or iTXt chunk."""
        kind = self.data[start - 4 : start]
        _, _, rest = self.data[start : min(end, start + orientation.MAX_TEXT_BYTES)].partition(b"\0")
        if kind == b"tEXt":
            return rest
        if kind == b"zTXt":
            return orientation.inflated(rest[1:])
        _, _, text = rest[2:].split(b"\0", 2) if rest.count(b"\0", 2) > 1 else (b"", b"", b"")
        return orientation.inflated(text) if rest[0] else text
