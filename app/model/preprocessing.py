"""Bytes of an image file to the RGB pixels that the network was trained on. Pillow and NumPy only."""

import io
import struct
from time import thread_time
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps

from app.errors import RequestError, TooLarge, UndecodableImage, UnsupportedImage, WrongSize
from app.model.containers import CONTAINERS

FORMATS = {"PNG": "image/png", "JPEG": "image/jpeg", "WEBP": "image/webp", "BMP": "image/bmp", "GIF": "image/gif"}

MAX_SIDE = 65_535  # pixels; Pillow keeps an allocated row a line, so narrow pictures would cost many times their pixels
WORK_LIMIT = 25_000_000  # units of Container.work for one picture: 0.5 s of CPU and 150 MB
SECONDS_PER_UNIT = 20e-9
BASE_COST = 3000  # units that the smallest file costs
UNITS_PER_BYTE = 0.5  # of an entropy-coded file

METERED_BYTES = 65_536  # Pillow reads as many at once; the CPU time of a longer file is checked between two reads
SLOWER = 2  # than its estimate may a file be decoded, with GRACE_S on top, before it is given up
GRACE_S = 0.1

REDUCED_SIDE = 16  # times the input size: at least this shorter side is left where a large picture is averaged first
STRIP_BLOCKS = 8  # rows of blocks that are converted and averaged at once

TRANSPOSITIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

Pixels = NDArray[np.uint8]


class Limits(NamedTuple):
    """At most max_pixels an image are decoded, and under strict_size only pictures of size x size."""

    size: int
    max_pixels: int
    strict_size: bool = False

    @property
    def work(self) -> int:
        """Units of Container.work for one picture; a higher max_pixels raises it in proportion."""
        return max(WORK_LIMIT, self.max_pixels)


class DecodedImage(NamedTuple):
    """Decoded pixels, uint8 [size, size, 3], and the size in the file where it was another: (width, height).

    `lossy` where the format seldom keeps every pixel; `dark_16_bit` where a file of 16 bits a channel uses only the
    lowest 12, as cameras and scanners write them, and so is nearly black.
    """

    pixels: Pixels
    resized_from: tuple[int, int] | None
    lossy: bool
    dark_16_bit: bool = False


def decode(data: bytes, limits: Limits) -> DecodedImage:
    """The picture as the network sees it. Raises as EncodedImage does."""
    return EncodedImage(data, limits).decode()


class EncodedImage:
    """An image file whose header has been read, its pixels not yet. The constructor takes well under a millisecond.

    Raises UnsupportedImage, UndecodableImage, TooLarge (more pixels or more work than the limits) or WrongSize.
    """

    def __init__(self, data: bytes, limits: Limits) -> None:
        kind = sniff(data)
        if kind is None:
            raise UnsupportedImage(f"Send one of {', '.join(FORMATS)}; the first bytes are of none of them.")
        try:
            container = CONTAINERS[kind](data)
        except (
            ValueError,
            IndexError,
            ZeroDivisionError,
            struct.error,
        ) as error:  # the bytes end early, or say nonsense
            raise _broken(kind) from error
        self._container = container
        self._limits = limits
        self.format = kind
        self.width, self.height = container.width, container.height
        self.lossy = container.lossy
        self._work = container.work(limits.size)
        self._check()

    @property
    def cost(self) -> int:
        """Estimated CPU time of `decode`, in units of SECONDS_PER_UNIT; a pixel of an 8-bit image is about one."""
        return BASE_COST + self._work + int(UNITS_PER_BYTE * len(self._container.data))

    @property
    def decoded_pixels(self) -> int:
        return self.width * self.height

    @property
    def cost_s(self) -> float:
        """Estimated seconds of CPU to decode the image."""
        return self.decoded_pixels * 2.5e-8

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
            image = self._load(essential.data)
            pixels = _pixels(_fit(image, essential.orientation, size))
        except RequestError:
            raise
        except Exception as error:  # a decoder fed with hostile bytes raises whatever its parsing trips over
            raise _broken(self.format) from error
        resized_from = None if (self.width, self.height) == (size, size) else (self.width, self.height)
        return DecodedImage(pixels, resized_from, self.lossy, self._container.bit_depth == 16 and _is_dark(pixels))

    def _check(self) -> None:
        limits, pixels = self._limits, self.width * self.height
        if max(self.width, self.height) > MAX_SIDE:
            raise TooLarge(f"The image is {self.width} x {self.height}; a side has at most {MAX_SIDE} pixels.")
        decoded = self._container.decoded_pixels(limits.size)
        if decoded > limits.max_pixels or self._work > limits.work:
            share = min(limits.max_pixels / max(decoded, 1), limits.work / max(self._work, 1))
            raise TooLarge(
                f"The image has {self.width} x {self.height} pixels; "
                f"at most {int(pixels * share)} of a {self._container.description} are accepted."
            )
        if pixels == 0:
            raise _broken(self.format)
        if limits.strict_size and (self.width, self.height) != (limits.size, limits.size):
            raise WrongSize(f"The image is {self.width} x {self.height}; only {limits.size} x {limits.size} is taken.")

    def _load(self, data: bytes) -> Image.Image:
        """The decoded picture, a large JPEG at the nearest scale above twice the input size."""
        image = self._container.plugin(self._stream(data))
        if image.size != (self.width, self.height):
            raise _broken(self.format)
        if self.format == "JPEG":
            image.draft("RGB", (2 * self._limits.size, 2 * self._limits.size))
        image.load()
        if self.format == "BMP" and image.mode == "RGBA" and image.getchannel("A").getextrema() == (0, 0):
            return image.convert("RGB")  # an alpha channel that nobody has filled
        return image

    def _stream(self, data: bytes) -> io.BytesIO:
        if len(data) <= METERED_BYTES:
            return io.BytesIO(data)
        return _MeteredFile(data, GRACE_S + SLOWER * SECONDS_PER_UNIT * self.cost)


class _MeteredFile(io.BytesIO):
    """A file whose reads end with an error once this thread has used so many seconds of CPU."""

    def __init__(self, data: bytes, seconds: float) -> None:
        super().__init__(data)
        self._end = thread_time() + seconds

    def read(self, size: int | None = -1, /) -> bytes:
        if thread_time() > self._end:
            raise UndecodableImage("The image takes far more time to decode than its size needs.")
        return super().read(size)


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


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode Pillow decodes to, as RGB: alpha over white, 16 bits to 8."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):  # 16-bit greyscale; Pillow's own conversion would clip at 255
        return Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return image.convert("RGB")


def _fit(image: Image.Image, orientation: int, size: int) -> Image.Image:
    """Upright, RGB, size x size."""
    factor = max(1, min(image.size) // (REDUCED_SIDE * size))
    if factor > 1 or image.width * image.height > (4 * REDUCED_SIDE * size) ** 2:
        return _upright(_fit_large(image, factor, size), orientation)
    rgb = to_rgb(_upright(image, orientation))
    return rgb if rgb.size == (size, size) else ImageOps.fit(rgb, (size, size), Image.Resampling.BICUBIC)


def _fit_large(image: Image.Image, factor: int, size: int) -> Image.Image:
    """The same from averages of factor x factor pixels, in strips, so that no copy of a large picture is made.

    Pillow's `resize(reducing_gap=REDUCED_SIDE)` makes the same averages of the same region, but of RGB only.
    """
    side = min(image.size)
    margin = -(-2 * side // size)  # what an antialiased bicubic filter sees beyond the square
    left, top = ((length - side) / 2 for length in image.size)
    x0, y0 = max(0, int(left) - margin), max(0, int(top) - margin)
    x1, y1 = min(image.width, int(left) + side + 1 + margin), min(image.height, int(top) + side + 1 + margin)
    averages = Image.new("RGB", (-(-(x1 - x0) // factor), -(-(y1 - y0) // factor)))
    rows = STRIP_BLOCKS * factor
    for place, y in enumerate(range(y0, y1, rows)):
        strip = image.crop((x0, y, x1, min(y + rows, y1)))
        averages.paste(_averaged(strip, factor), (0, STRIP_BLOCKS * place))
    box = ((left - x0) / factor, (top - y0) / factor, (left - x0 + side) / factor, (top - y0 + side) / factor)
    return averages.resize((size, size), Image.Resampling.BICUBIC, box)


def _averaged(image: Image.Image, factor: int) -> Image.Image:
    """RGB averages of factor x factor pixels, weighted with their alpha."""
    if image.has_transparency_data and not image.mode.startswith("I"):
        layer = image if image.mode in ("LA", "RGBA") else image.convert("RGBA")
        return to_rgb(layer.reduce(factor))
    return to_rgb(image).reduce(factor)


def _upright(image: Image.Image, orientation: int) -> Image.Image:
    """The picture as it is meant to be seen, by its EXIF orientation of 1 to 8."""
    method = TRANSPOSITIONS.get(orientation)
    return image if method is None else image.transpose(method)


def _broken(kind: str) -> UndecodableImage:
    return UndecodableImage(f"The {kind} data is broken or incomplete.")


def _is_dark(pixels: Pixels) -> bool:
    """Whether no value of 16 bits needed more than 12, in a picture that is not black."""
    return 0 < int(pixels.max()) < 16


def _pixels(image: Image.Image) -> Pixels:
    """uint8 [height, width, 3]; cheaper than NumPy's own conversion."""
    return np.frombuffer(image.tobytes(), np.uint8).reshape(image.height, image.width, 3)
