"""Bytes of an image file to the RGB pixels the network was trained on. Pillow and NumPy only."""

import io
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from app.errors import TooLarge, UndecodableImage, UnsupportedImage, WrongSize

FORMATS = {"PNG": "image/png", "JPEG": "image/jpeg", "WEBP": "image/webp", "BMP": "image/bmp", "GIF": "image/gif"}

Pixels = NDArray[np.uint8]


class Picture(NamedTuple):
    """Decoded pixels, uint8 [size, size, 3], and the size in the file where it was another: (width, height)."""

    pixels: Pixels
    resized_from: tuple[int, int] | None


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


def decode(data: bytes, size: int, max_pixels: int, strict_size: bool = False) -> Picture:
    """The picture as the network sees it: upright, RGB, size x size.

    Another size is scaled, antialiased, so that its shorter side fits, and cut at the centre.
    Raises UnsupportedImage, UndecodableImage, TooLarge (more than max_pixels) or WrongSize.
    """
    kind = sniff(data)
    if kind is None:
        raise UnsupportedImage(f"Send one of {', '.join(FORMATS)}; the first bytes are of none of them.")
    try:
        with Image.open(io.BytesIO(data), formats=[kind]) as image:
            return _picture(image, size, max_pixels, strict_size)
    except (TooLarge, WrongSize):
        raise
    except Image.DecompressionBombError as error:
        raise TooLarge(f"The image has too many pixels; at most {max_pixels} are taken.") from error
    except Exception as error:  # a decoder fed with hostile bytes raises whatever its parsing trips over
        raise UndecodableImage(f"The {kind} data is broken or incomplete.") from error


def _picture(image: Image.Image, size: int, max_pixels: int, strict_size: bool) -> Picture:
    width, height = image.size
    if width * height > max_pixels:
        raise TooLarge(f"The image has {width} x {height} pixels; at most {max_pixels} are taken.")
    if strict_size and (width, height) != (size, size):
        raise WrongSize(f"The image is {width} x {height}; only {size} x {size} is taken.")
    image.draft("RGB", (2 * size, 2 * size))  # a large JPEG is decoded at the nearest size above this
    rgb = to_rgb(ImageOps.exif_transpose(image))
    if (width, height) == (size, size):
        return Picture(np.asarray(rgb), None)
    fitted = ImageOps.fit(rgb, (size, size), Image.Resampling.BICUBIC)
    return Picture(np.asarray(fitted), (width, height))


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode Pillow decodes to, as RGB: alpha over white, 16 bits to 8."""
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I"):  # 16-bit greyscale; Pillow's own conversion would clip at 255
        return Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return image.convert("RGB")
