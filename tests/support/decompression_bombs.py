"""PNG files that decompress to far more than their size, and the memory that decoding them needs.

`python -m tests.support.decompression_bombs` prints, for each, its name and the growth of the peak memory in MB.
"""

import resource
import struct
import zlib
from contextlib import suppress

from app.errors import RequestError
from app.model.preprocessing import Limits, decode

INFLATED_MB = 200


def deflated(megabytes: int) -> bytes:
    packer = zlib.compressobj(9)
    return b"".join(packer.compress(bytes(1 << 20)) for _ in range(megabytes)) + packer.flush()


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(before: bytes = b"", pixels: bytes = b"", after: bytes = b"") -> bytes:
    """A black 32 x 32 RGB image with further chunks around its pixels, or with other compressed pixels."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 32, 32, 8, 2, 0, 0, 0))
    pixels = pixels or zlib.compress(bytes(32 * 97))
    return b"\x89PNG\r\n\x1a\n" + head + before + chunk(b"IDAT", pixels) + after + chunk(b"IEND", b"")


def bombs() -> dict[str, bytes]:
    bomb, small = deflated(INFLATED_MB), deflated(1)
    many = b"".join(chunk(b"zTXt", b"k%d\0\0" % i + small) for i in range(INFLATED_MB))
    return {
        "IDAT": png(pixels=bomb),
        "zTXt": png(chunk(b"zTXt", b"k\0\0" + bomb)),
        "iTXt": png(chunk(b"iTXt", b"k\0\1\0\0\0" + bomb)),
        "iCCP": png(chunk(b"iCCP", b"k\0\0" + bomb)),
        "zTXt-after": png(after=chunk(b"zTXt", b"k\0\0" + bomb)),
        "tEXt": png(chunk(b"tEXt", b"k\0" + bytes(9_000_000))),
        "many-zTXt": png(many),
        "eXIf": png(chunk(b"eXIf", b"\xff" * 9_000_000)),
    }


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    files = bombs()
    start = peak_mb()
    for name, data in files.items():
        before = peak_mb()
        with suppress(RequestError):
            decode(data, Limits(32, 25_000_000))
        print(name, round(peak_mb() - before, 1))  # noqa: T201
    print("all", round(peak_mb() - start, 1))  # noqa: T201


if __name__ == "__main__":
    main()
