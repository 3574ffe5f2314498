"""Bytes of an image file to the RGB pixels that the network was trained on. Pillow and NumPy only."""

import io
import struct
from collections.abc import Sequence
from time import thread_time
from typing import IO, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image

from app.errors import RequestError, TooLarge, UndecodableImage, UnsupportedImage, WrongSize
from app.model import resampling
from app.model.containers import CONTAINERS
from app.model.containers.stream import Part, Stream
from app.model.signatures import describe, sniff

FORMATS = {"PNG": "image/png", "JPEG": "image/jpeg", "WEBP": "image/webp", "BMP": "image/bmp", "GIF": "image/gif"}

MAX_SIDE = 65_535  # pixels; Pillow keeps an allocated row a line, so narrow pictures would cost many times their pixels
WORK_LIMIT = 25_000_000  # units of Container.work for one picture: 0.5 s of CPU and 150 MB
SECONDS_PER_UNIT = 20e-9
BASE_COST = 3000  # units that the smallest file costs
UNITS_PER_BYTE = 0.5  # of an entropy-coded file

METERED_BYTES = 65_536  # Pillow reads as many at once; the CPU time of a longer file is checked between two reads
MAX_SLOWDOWN = 3  # of decoding against its estimate, with GRACE_S on top, before the file is refused
GRACE_S = 0.1
MAX_READ_S = 0.4  # of CPU for reading a picture within WORK_LIMIT; 0.3 at most for files that an encoder has written
CALIBRATION_S = 0.003  # of CPU for the picture of `measure_slowdown`, on the machine of the other figures

Pixels = NDArray[np.uint8]


class Limits(NamedTuple):
    """At most max_pixels an image are decoded, and under strict_size only pictures of size x size.

    `slowdown` is this machine's CPU time for the same work against the one on which the limits were measured.
    """

    size: int
    max_pixels: int
    strict_size: bool = False
    slowdown: float = 1.0

    @property
    def work(self) -> int:
        """Units of Container.work for one picture; a higher max_pixels raises it in proportion."""
        return max(WORK_LIMIT, self.max_pixels)


class DecodedImage(NamedTuple):
    """Decoded pixels, uint8 [size, size, 3], and the size in the file where it was another: (width, height).

    `dark_16_bit` where a file of 16 bits a channel uses only the lowest 12, as cameras and scanners write them, and so
    is nearly black.
    """

    pixels: Pixels
    resized_from: tuple[int, int] | None
    dark_16_bit: bool = False


def decode(data: bytes, limits: Limits) -> DecodedImage:
    """The picture as the network's input. Raises as EncodedImage does."""
    return EncodedImage(data, limits).decode()


class EncodedImage:
    """An image file whose header has been read, its pixels not yet. The constructor takes well under a millisecond.

    Raises UnsupportedImage, UndecodableImage, TooLarge (more pixels or more work than the limits) or WrongSize.
    """

    def __init__(self, data: bytes, limits: Limits) -> None:
        kind = sniff(data)
        if kind is None:
            raise UnsupportedImage(f"Send one of {', '.join(FORMATS)}; {describe(data)}.")
        try:
            container = CONTAINERS[kind](data)
        except (
            ValueError,
            IndexError,
            ZeroDivisionError,
            struct.error,
        ) as error:  # truncated or invalid data
            raise _broken(kind) from error
        self._container = container
        self._limits = limits
        self.format = kind
        self.width, self.height = container.width, container.height
        self._work = container.work(limits.size)
        self._check()

    @property
    def cost_s(self) -> float:
        """Estimated seconds of CPU of `decode`, at the worst for such a header."""
        return SECONDS_PER_UNIT * (BASE_COST + self._work + UNITS_PER_BYTE * len(self._container.data))

    @property
    def decoded_pixels(self) -> int:
        """Pixels that the decoder writes; fewer than width x height for a large JPEG, which is decoded at a scale."""
        return self._container.decoded_pixels(self._limits.size)

    @property
    def is_cheap(self) -> bool:
        """Whether it decodes in less time than a thread takes to wake."""
        area = self._limits.size**2
        return self.width * self.height <= 4 * area and len(self._container.data) <= 32 * area

    def decode(self) -> DecodedImage:
        """Upright, RGB, size x size. Another size is scaled, antialiased, and cut at the centre to a square.

        Raises UndecodableImage.
        """
        size = self._limits.size
        try:
            essential = self._container.essential(self._limits.work)
            image = self._load(essential.parts)
            pixels = _pixels(resampling.fit(image, essential.orientation, size))
        except RequestError:
            raise
        except Exception as error:  # a decoder fed with hostile bytes raises whatever its parsing trips over
            raise _broken(self.format) from error
        resized_from = None if (self.width, self.height) == (size, size) else (self.width, self.height)
        return DecodedImage(pixels, resized_from, self._container.bit_depth == 16 and _is_dark(pixels))

    def _check(self) -> None:
        limits, pixels = self._limits, self.width * self.height
        if max(self.width, self.height) > MAX_SIDE:
            raise TooLarge(f"The image is {self.width} x {self.height}; a side has at most {MAX_SIDE} pixels.")
        decoded = self.decoded_pixels
        if decoded > limits.max_pixels or self._work > limits.work:
            raise TooLarge(self._too_large(limits.max_pixels / max(decoded, 1), limits.work / max(self._work, 1)))
        if pixels == 0:
            raise _broken(self.format)
        if limits.strict_size and (self.width, self.height) != (limits.size, limits.size):
            raise WrongSize(
                f"The image is {self.width} x {self.height}; only {limits.size} x {limits.size} is accepted."
            )

    def _too_large(self, pixels_share: float, work_share: float) -> str:
        accepted = int(self.width * self.height * min(pixels_share, work_share))
        of_kind = f" of a {self._container.description}" if work_share < pixels_share else ""
        return f"The image has {self.width} x {self.height} pixels; at most {accepted}{of_kind} are accepted."

    def _load(self, parts: Sequence[Part]) -> Image.Image:
        """The decoded picture, a large JPEG at the nearest scale above twice the input size."""
        image = self._container.plugin(self._open(parts))
        if image.size != (self.width, self.height):
            raise _broken(self.format)
        if self.format == "JPEG":
            image.draft("RGB", (2 * self._limits.size, 2 * self._limits.size))
        image.load()
        if self.format == "BMP" and image.mode == "RGBA" and image.getchannel("A").getextrema() == (0, 0):
            return image.convert("RGB")  # an unused alpha channel
        return image

    def _open(self, parts: Sequence[Part]) -> IO[bytes]:
        if len(self._container.data) <= METERED_BYTES:
            return io.BytesIO(parts[0] if len(parts) == 1 else b"".join(parts))
        largest_s = MAX_READ_S * self._limits.work / WORK_LIMIT
        seconds = min(GRACE_S + MAX_SLOWDOWN * self.cost_s, largest_s) * self._limits.slowdown
        return cast("IO[bytes]", Stream(parts, seconds))


def load_decoders() -> None:
    """Lets Pillow load now what it loads with the first picture of a format.

    At that later moment there may be no descriptor left to load it with, and a sound picture would seem broken.
    """
    turned = Image.Exif()
    turned[ExifTags.Base.Orientation] = 6
    for kind in FORMATS:
        buffer = io.BytesIO()
        Image.new("RGB", (2, 2)).save(buffer, kind, exif=turned)
        decode(buffer.getvalue(), Limits(1, 4))


def measure_slowdown() -> float:
    """For Limits, at least 1: the best of several times of a PNG of noise, in 20 ms."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (512, 512, 3), np.uint8))
    buffer = io.BytesIO()
    noise.save(buffer, "PNG", compress_level=1)
    times = []
    for _ in range(5):
        start = thread_time()
        decode(buffer.getvalue(), Limits(32, 512 * 512))
        times.append(thread_time() - start)
    return max(1.0, min(times) / CALIBRATION_S)


def _broken(kind: str) -> UndecodableImage:
    return UndecodableImage(f"The {kind} data is broken or incomplete.")


def _is_dark(pixels: Pixels) -> bool:
    """Whether no value of 16 bits needed more than 12, in a picture that is not black."""
    return 0 < int(pixels.max()) < 16


def _pixels(image: Image.Image) -> Pixels:
    """uint8 [height, width, 3]; cheaper than NumPy's own conversion."""
    return np.frombuffer(image.tobytes(), np.uint8).reshape(image.height, image.width, 3)
