"""Bytes of an image file to the RGB pixels the network was trained on. Pillow and NumPy only."""

import io
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps

from app.errors import RequestError, TooLarge, UndecodableImage, UnsupportedImage, WrongSize

FORMATS = {"PNG": "image/png", "JPEG": "image/jpeg", "WEBP": "image/webp", "BMP": "image/bmp", "GIF": "image/gif"}

LOSSY = {"JPEG", "WEBP"}

ORIENTATION_METADATA = {"exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp"}  # where Pillow reads it from

MAX_SCANS = 100  # of a JPEG; a camera's has 1, a progressive one about 10, and each goes over all pixels again
SCAN = b"\xff\xda"

Pixels = NDArray[np.uint8]


class Limits(NamedTuple):
    """What is taken: at most max_pixels an image, and under strict_size only size x size."""

    size: int
    max_pixels: int
    strict_size: bool = False


class DecodedImage(NamedTuple):
    """Decoded pixels, uint8 [size, size, 3], and the size in the file where it was another: (width, height).

    `lossy` where the format seldom keeps every pixel.
    """

    pixels: Pixels
    resized_from: tuple[int, int] | None
    lossy: bool


def decode(data: bytes, limits: Limits) -> DecodedImage:
    """The picture as the network sees it. Raises as EncodedImage does."""
    return EncodedImage(data, limits).decode()


class EncodedImage:
    """An image file whose head has been read, its pixels not yet.

    Raises UnsupportedImage, UndecodableImage, TooLarge (more than max_pixels) or WrongSize.
    """

    def __init__(self, data: bytes, limits: Limits) -> None:
        kind = sniff(data)
        if kind is None:
            raise UnsupportedImage(f"Send one of {', '.join(FORMATS)}; the first bytes are of none of them.")
        if kind == "JPEG" and data.count(SCAN) > MAX_SCANS:
            raise UndecodableImage(f"The JPEG has more than {MAX_SCANS} scans.")
        self._kind = kind
        self._limits = limits
        with _decoding(kind, limits):
            self._image: Image.Image = Image.open(io.BytesIO(data), formats=[kind])
        self.width, self.height = self._image.size
        if self.width * self.height > limits.max_pixels:
            raise TooLarge(f"The image has {self.width} x {self.height} pixels; at most {limits.max_pixels} are taken.")
        if limits.strict_size and (self.width, self.height) != (limits.size, limits.size):
            raise WrongSize(f"The image is {self.width} x {self.height}; only {limits.size} x {limits.size} is taken.")

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
        return self.width * self.height <= 4 * self._limits.size**2

    def decode(self) -> DecodedImage:
        """Upright, RGB, size x size. Another size is scaled, antialiased, and cut at the centre to a square."""
        size = self._limits.size
        with _decoding(self._kind, self._limits), self._image as image:
            image.draft("RGB", (2 * size, 2 * size))  # a large JPEG is decoded at the nearest size above this
            image.load()
            if ORIENTATION_METADATA & image.info.keys():
                with suppress(Exception):  # broken metadata is no reason to refuse a sound picture
                    ImageOps.exif_transpose(image, in_place=True)
            rgb = to_rgb(image)
            if (self.width, self.height) == (size, size):
                return DecodedImage(_pixels(rgb), None, self._kind in LOSSY)
            fitted = ImageOps.fit(rgb, (size, size), Image.Resampling.BICUBIC)
            return DecodedImage(_pixels(fitted), (self.width, self.height), self._kind in LOSSY)


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


@contextmanager
def _decoding(kind: str, limits: Limits) -> Iterator[None]:
    try:
        yield
    except RequestError:
        raise
    except Image.DecompressionBombError as error:
        raise TooLarge(f"The image has too many pixels; at most {limits.max_pixels} are taken.") from error
    except Exception as error:  # a decoder fed with hostile bytes raises whatever its parsing trips over
        raise UndecodableImage(f"The {kind} data is broken or incomplete.") from error


def _pixels(image: Image.Image) -> Pixels:
    """uint8 [height, width, 3]; cheaper than NumPy's own conversion."""
    return np.frombuffer(image.tobytes(), np.uint8).reshape(image.height, image.width, 3)
