"""Pictures that are slow or large to decode for their size, and what decoding them costs.

`python -m tests.support.hostile_images` prints a line of JSON a picture: its name, bytes, milliseconds of the
constructor, seconds of CPU and megabytes of memory of all, and the outcome. Linux only: it reads /proc. Start it with
ENVIRONMENT, else memory that the allocator keeps hides what the next picture needs.
"""

import io
import json
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from time import process_time

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image

from app.errors import RequestError
from app.model.preprocessing import EncodedImage, Limits, load_decoders, measure_slowdown
from tests.support import decompression_bombs
from tests.support.decompression_bombs import chunk

ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
FILE_BYTES = 9_900_000  # the default MAX_FILE_BYTES is 10 MB
ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))

Builder = Callable[[], bytes]


def png(
    width: int, height: int, bits: int, colour: int, rows: bytes, before: bytes = b"", interlaced: int = 0
) -> bytes:
    """A PNG of the given bit depth and colour type around filtered rows."""
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, interlaced)
    idat = chunk(b"IDAT", zlib.compress(rows, 1))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + before + idat + chunk(b"IEND", b"")


def paeth_png(width: int, height: int, bits: int, colour: int, channels: int, before: bytes = b"") -> bytes:
    """Rows of the slowest filter; the first 30 MB of them hold one random bit a byte, the slowest to inflate."""
    row_bytes = (width * bits * channels + 7) // 8
    rows = np.zeros((height, row_bytes + 1), np.uint8)
    noisy = min(height, 30_000_000 // row_bytes)
    rows[:noisy, 1:] = np.random.default_rng(0).integers(0, 2, (noisy, row_bytes), np.uint8)
    rows[:, 0] = 4
    return png(width, height, bits, colour, rows.tobytes(), before=before)


def interlaced_png(width: int, height: int, bits: int, colour: int, channels: int) -> bytes:
    rows = b""
    for x, y, across, down in ADAM7:
        columns, lines = -(-(width - x) // across), -(-(height - y) // down)
        rows += (b"\x04" + bytes((columns * bits * channels + 7) // 8)) * lines
    return png(width, height, bits, colour, rows, interlaced=1)


def chunks_png(kind: bytes, content: bytes = b"", size: int = FILE_BYTES) -> bytes:
    """A small picture behind as many chunks as fit."""
    one = chunk(kind, content)
    return decompression_bombs.png(before=one * (size // len(one)))


def empty_blocks_png(width: int, height: int) -> bytes:
    """A deflate stream of nothing but empty blocks, each with a code table of its own."""
    fields = [(0, 1), (2, 2), (0, 5), (0, 5), (14, 4)]  # dynamic block; 257 literal codes, 1 distance code
    order = (16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1)
    fields += [(int(symbol in (18, 1)), 3) for symbol in order]
    fields += [(1, 1), (127, 7), (1, 1), (107, 7), (0, 1), (0, 1), (0, 1)]  # 256 zeros, two lengths of 1, end of block
    bits = "".join(f"{value:0{length}b}"[::-1] for value, length in fields) * 8
    block = bytes(int(bits[place : place + 8][::-1], 2) for place in range(0, len(bits), 8))
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    idat = chunk(b"IDAT", b"\x78\x01" + block * (FILE_BYTES // len(block)))
    return b"\x89PNG\r\n\x1a\n" + header + idat + chunk(b"IEND", b"")


def pixels_then_empty_blocks_png(width: int, height: int, before: bytes = b"") -> bytes:
    """All rows but the last, which the blocks without content hold up."""
    deflate = zlib.compressobj(1)
    pixels = deflate.compress((b"\x04" + bytes(3 * width)) * (height - 1)) + deflate.flush(zlib.Z_FULL_FLUSH)
    flood = empty_blocks_png(width, height)
    start = flood.index(b"IDAT") + 6
    header = flood[:33] + before
    idat = chunk(b"IDAT", pixels + flood[start : start + FILE_BYTES - len(pixels)])
    return header + idat + chunk(b"IEND", b"")


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def flat(mode: str, width: int, height: int, kind: str, **options: object) -> bytes:
    return encoded(Image.new(mode, (width, height), 90), kind, **options)


def noise(width: int, height: int, kind: str, **options: object) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 255, (height, width, 3), np.uint8)
    return encoded(Image.fromarray(pixels), kind, **options)


def jpeg_with(inserted: bytes, size: int = FILE_BYTES, *, place: int = 2) -> bytes:
    """A small JPEG with as many copies of some bytes as fit, behind its first bytes."""
    small = flat("RGB", 32, 32, "JPEG")
    return small[:place] + inserted * (size // len(inserted)) + small[place:]


def jpeg_scans(count: int, width: int, height: int) -> bytes:
    """A progressive JPEG that repeats its last scan, a pass over all coefficients."""
    data = flat("RGB", width, height, "JPEG", progressive=True)
    last = data[data.rindex(b"\xff\xda") : -2]
    return data[:-2] + last * (count - data.count(b"\xff\xda")) + data[-2:]


def jpeg_fill_between_scans() -> bytes:
    data = flat("RGB", 64, 64, "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:last] + b"\xff" * FILE_BYTES + data[last:]


def segment(marker: int, content: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(content) + 2) + content


def webp_prefix_codes(width: int, height: int) -> bytes:
    """A lossless WebP with a group of five prefix codes for every 4 x 4 pixels: 65,536 groups, the format's most."""
    groups = (width // 4) * (height // 4)
    bits: list[NDArray[np.uint8]] = []

    def put(values: ArrayLike, length: int) -> None:
        bits.append((np.asarray(values).reshape(-1, 1) >> np.arange(length) & 1).astype(np.uint8).ravel())

    def put_eight_bit_code(symbols: int) -> None:
        """All of the first 256 symbols with 8 bits each; of the code lengths 8 and 18, each has one bit."""
        order = (17, 18, 0, 1, 2, 3, 4, 5, 16, 6, 7, 8)
        put([0], 1)
        put([len(order) - 4], 4)
        put([int(length in (8, 18)) for length in order], 3)
        put([0] * 257, 1)
        if symbols > 256:
            put([1], 1)
            put([symbols - 256 - 11], 7)

    for value, length in ((0x2F, 8), (width - 1, 14), (height - 1, 14), (0, 4), (0, 2), (1, 1), (0, 3), (0, 1)):
        put([value], length)  # no alpha, version 0, no transform, no cache; groups of 4 x 4 pixels, no cache
    put_eight_bit_code(280)
    put_eight_bit_code(256)
    put([1, 0, 0, 0] * 3, 1)
    reversed_bits = np.array([int(f"{value:08b}"[::-1], 2) for value in range(256)])
    index = np.arange(groups)
    put(reversed_bits[index & 255] | reversed_bits[index >> 8] << 8, 16)
    put([1, 0, 0, 0] * 5 * groups, 1)
    data = np.packbits(np.concatenate(bits), bitorder="little").tobytes() + bytes(64)
    data += bytes(len(data) & 1)
    return b"RIFF" + struct.pack("<I", len(data) + 12) + b"WEBPVP8L" + struct.pack("<I", len(data)) + data


def gif_with(inserted: bytes, size: int = FILE_BYTES) -> bytes:
    """A small GIF with as many copies of some bytes as fit before its frame."""
    small = flat("P", 32, 32, "GIF")
    place = 13 + (3 << (small[10] & 7) + 1 if small[10] & 0x80 else 0)
    return small[:place] + inserted * (size // len(inserted)) + small[place:]


def gif_clear_codes(width: int, height: int) -> bytes:
    """LZW data of nothing but clear codes, of three bits each."""
    small = flat("P", 1, 1, "GIF")
    head = small[:6] + struct.pack("<HHBBB", width, height, 0, 0, 0)
    frame = b"," + struct.pack("<HHHHB", 0, 0, width, height, 0) + b"\2"
    codes = np.packbits(np.tile([0, 0, 1], 8 * 85), bitorder="little").tobytes()  # 255 bytes of the code 4
    return head + frame + (b"\xff" + codes) * (FILE_BYTES // 256) + b"\0;"


def gif_screen(width: int, height: int) -> bytes:
    """One transparent pixel on a large screen."""
    small = flat("P", 1, 1, "GIF", transparency=0)
    return small[:6] + struct.pack("<HH", width, height) + small[10:]


def bmp(width: int, height: int, compression: int, bits: int, data: bytes, colours: int = 0) -> bytes:
    palette = bytes(4 << bits) if bits <= 8 else b""
    info = struct.pack("<IiiHHIIiiII", 40, width, height, 1, bits, compression, len(data), 0, 0, colours, 0)
    offset = 14 + len(info) + len(palette)
    return b"BM" + struct.pack("<IHHI", offset + len(data), 0, 0, offset) + info + palette + data


def exif_directory(entries: int) -> bytes:
    fields = b"".join(struct.pack("<HHII", 0x9000, 3, 1, 1) for _ in range(entries))
    return b"II*\0\x08\0\0\0" + struct.pack("<H", entries) + fields


def png_kinds() -> dict[str, Builder]:
    palette = chunk(b"PLTE", bytes(range(256)) * 3) + chunk(b"tRNS", bytes(range(256)))
    raw_profile = chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(bytes(1 << 20)))
    return {
        "png-rgb": lambda: paeth_png(5000, 2916, 8, 2, 3),
        "png-rgba": lambda: paeth_png(5000, 2187, 8, 6, 4),
        "png-rgb-16": lambda: paeth_png(5000, 1458, 16, 2, 3),
        "png-rgba-16": lambda: paeth_png(5000, 1093, 16, 6, 4),
        "png-grey": lambda: paeth_png(5000, 4999, 8, 0, 1),
        "png-grey-alpha": lambda: paeth_png(5000, 3124, 8, 4, 2),
        "png-grey-16": lambda: paeth_png(5000, 3124, 16, 0, 1),
        "png-palette-alpha": lambda: paeth_png(5000, 3124, 8, 3, 1, palette),
        "png-colour-key": lambda: paeth_png(5000, 2187, 8, 2, 3, chunk(b"tRNS", bytes(6))),
        "png-colour-key-too-large": lambda: paeth_png(5000, 2916, 8, 2, 3, chunk(b"tRNS", bytes(6))),
        "png-grey-colour-key": lambda: paeth_png(5000, 3124, 8, 0, 1, chunk(b"tRNS", bytes(2))),
        "png-1-bit": lambda: paeth_png(5000, 4990, 1, 0, 1),
        "png-wide": lambda: paeth_png(65_535, 222, 8, 2, 3),
        "png-tall": lambda: paeth_png(166, 65_535, 8, 6, 4),
        "png-1023-wide": lambda: paeth_png(1023, 10_690, 8, 6, 4),
        "png-one-row": lambda: png(25_000_000, 1, 8, 0, bytes(25_000_001)),
        "png-interlaced": lambda: interlaced_png(5000, 2916, 8, 2, 3),
        "png-interlaced-16": lambda: interlaced_png(5000, 1093, 16, 6, 4),
        "png-chunks": lambda: chunks_png(b"abCd"),
        "png-idat-chunks": lambda: chunks_png(b"IDAT"),
        "png-texts": lambda: chunks_png(b"tEXt", b"k\0"),
        "png-raw-profiles": lambda: decompression_bombs.png(before=raw_profile * 9000),
        "png-frames": lambda: chunks_png(b"fcTL", bytes(26)),
        "png-exif-entries": lambda: decompression_bombs.png(chunk(b"eXIf", exif_directory(65_535))),
        "png-empty-blocks": lambda: empty_blocks_png(5000, 2916),
        "png-small-empty-blocks": lambda: empty_blocks_png(32, 32),
        "png-pixels-then-empty-blocks": lambda: pixels_then_empty_blocks_png(5000, 2916),
        "png-colour-key-then-empty-blocks": lambda: pixels_then_empty_blocks_png(5000, 2187, chunk(b"tRNS", bytes(6))),
        **{f"bomb-{name}": lambda data=data: data for name, data in decompression_bombs.bombs().items()},
    }


def jpeg_kinds() -> dict[str, Builder]:
    return {
        "jpeg-300-megapixels": lambda: flat("L", 22_000, 17_000, "JPEG"),
        "jpeg-48-megapixels": lambda: flat("RGB", 8000, 6000, "JPEG"),
        "jpeg-noise": lambda: noise(5000, 4000, "JPEG", quality=50),
        "jpeg-narrow": lambda: noise(65_500, 127, "JPEG", quality=50),
        "jpeg-progressive": lambda: noise(5000, 4100, "JPEG", quality=13, progressive=True, subsampling=0),
        "jpeg-progressive-cmyk": lambda: flat("CMYK", 4000, 3850, "JPEG", progressive=True),
        "jpeg-scans": lambda: jpeg_scans(95, 5000, 4000),
        "jpeg-scans-within": lambda: jpeg_scans(95, 1000, 1000),
        "jpeg-fill": lambda: jpeg_with(b"\xff"),
        "jpeg-junk": lambda: jpeg_with(b"\x01", place=20),
        "jpeg-comments": lambda: jpeg_with(segment(0xFE, b"")),
        "jpeg-app-segments": lambda: jpeg_with(segment(0xE7, b"")),
        "jpeg-exif-segments": lambda: jpeg_with(segment(0xE1, b"Exif\0\0" + exif_directory(0))),
        "jpeg-tables": lambda: jpeg_with(segment(0xC4, b"")),
        "jpeg-fill-between-scans": jpeg_fill_between_scans,
    }


def other_kinds() -> dict[str, Builder]:
    return {
        "webp": lambda: noise(2750, 2750, "WEBP", quality=60, method=0),
        "webp-fine": lambda: noise(2750, 2750, "WEBP", quality=82, method=0),
        "webp-lossless": lambda: noise(1800, 1500, "WEBP", lossless=True, quality=0, method=0),
        "webp-alpha": lambda: flat("RGBA", 2750, 2750, "WEBP", lossless=True, method=0),
        "webp-prefix-codes": lambda: webp_prefix_codes(1024, 1024),
        "webp-25-megapixels": lambda: flat("RGB", 5000, 5000, "WEBP", lossless=True, method=0),
        "gif-noise": lambda: encoded(Image.effect_noise((5000, 4160), 80).quantize(4), "GIF", transparency=0),
        "gif-clear-codes": lambda: gif_clear_codes(5000, 4160),
        "gif-screen": lambda: gif_screen(5000, 4160),
        "gif-tall": lambda: flat("P", 340, 60_000, "GIF", transparency=0),
        "gif-extensions": lambda: gif_with(b"!\x01\0"),
        "gif-comment": lambda: gif_with(b"!\xfe\1c\0"),
        "gif-junk": lambda: gif_with(b"\1"),
        "bmp-run-lengths": lambda: bmp(25_000_000, 1, 1, 8, b"\x01\x01\x00\x00\x00\x01"),
        "bmp-run-lengths-4": lambda: bmp(5000, 5000, 2, 4, (b"\xff\x12" * 19 + b"\x9b\x12\0\0") * 5000 + b"\0\1"),
        "bmp-1-bit": lambda: bmp(5000, 5000, 0, 1, bytes(628 * 5000)),
        "bmp-colours": lambda: bmp(32, 32, 0, 8, bytes(1024), colours=65_536),
        "bmp-truncated": lambda: bmp(5000, 5000, 0, 24, bytes(100)),
    }


def memory_mb(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":")) / 1024


def measured(data: bytes, limits: Limits) -> dict[str, float | str]:
    Path("/proc/self/clear_refs").write_text("5")  # the peak of memory starts again from here
    memory, start, outcome = memory_mb("VmRSS"), process_time(), "decoded"
    opened = None
    try:
        image = EncodedImage(data, limits)
        opened = process_time()
        image.decode()
    except RequestError as error:
        outcome = str(error)
    end = process_time()
    return {
        "open_ms": round(1e3 * ((opened or end) - start), 2),
        "cpu_s": round(end - start, 3),
        "peak_mb": round(memory_mb("VmHWM") - memory, 1),
        "outcome": outcome,
    }


def main() -> None:
    load_decoders()
    limits = Limits(32, 25_000_000, slowdown=measure_slowdown())
    Image.MAX_IMAGE_PIXELS = None
    for name, build in {**png_kinds(), **jpeg_kinds(), **other_kinds()}.items():
        data = build()
        print(json.dumps({"name": name, "bytes": len(data), **measured(data, limits)}), flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
