"""A picture of any source as the service would see it, with the formats that training reads beside the service's."""

import io
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, UnidentifiedImageError, features

from app.errors import RequestError
from app.model import resampling
from app.model.preprocessing import FORMATS, DecodedImage, Limits, decode
from app.model.signatures import sniff
from training.datasets.listing import Source

# The owner of a data set is trusted with large images; the limit stops decompression bombs only.
MAX_PIXELS = 1 << 28

# Pillow's names. Scanners and microscopes write TIFF, GTSRB has PPM; the service does not accept them.
OTHER_FORMATS = ("TIFF", "PPM", *(("AVIF",) if features.check("avif") else ()))

# Of files that are meant as pictures, whether they can be read or not.
SUFFIXES = frozenset(
    {
        ".png",
        ".apng",
        ".jpg",
        ".jpeg",
        ".jpe",
        ".jfif",
        ".webp",
        ".bmp",
        ".dib",
        ".gif",
        ".tif",
        ".tiff",
        ".ppm",
        ".pgm",
        ".pbm",
        ".pnm",
        ".avif",
        ".heic",
        ".heif",
        ".jp2",
        ".jxl",
        ".svg",
        ".psd",
        ".dcm",
        ".cr2",
        ".nef",
        ".arw",
        ".dng",
        ".tga",
        ".ico",
    }
)

Pixels = NDArray[np.uint8]


def read(source: Source, size: int) -> Pixels | str:
    """Pixels uint8 [size, size, 3], or the reason why there are none."""
    decoded = decode_source(source, size)
    return decoded if isinstance(decoded, str) else decoded.pixels


def decode_source(source: Source, size: int) -> DecodedImage | str:
    """As the service decodes it where it accepts the format, or the reason why there is no picture."""
    try:
        if isinstance(source, np.ndarray):
            return DecodedImage(_fit(source, size), None)
        if callable(source):
            return DecodedImage(np.asarray(resampling.fit(source(), 1, size)), None)
        data = source.read_bytes() if isinstance(source, Path) else source
        if sniff(data):
            return decode(data, Limits(size, MAX_PIXELS))
        other = _decode_other(data, size)
        return other if isinstance(other, str) else DecodedImage(other, None)
    except (RequestError, OSError, ValueError, RuntimeError) as error:  # RuntimeError: a damaged AVIF
        return _reason(error)


def native_size(source: Source) -> tuple[int, int] | None:
    """(width, height) from the header of the picture, or None where it cannot be read."""
    if isinstance(source, np.ndarray):
        return source.shape[1], source.shape[0]
    try:
        if callable(source):
            return source().size
        with Image.open(source if isinstance(source, Path) else io.BytesIO(source)) as image:
            return image.size
    except (OSError, ValueError, RuntimeError, SyntaxError, Image.DecompressionBombError):
        return None


def is_meant_as_picture(path: Path) -> bool:
    """Whether the suffix or the first bytes are those of a picture."""
    if path.suffix.lower() in SUFFIXES:
        return True
    if path.suffix:
        return False
    try:
        with path.open("rb") as stream:
            return sniff(stream.read(16)) is not None
    except OSError:
        return False


def _fit(array: NDArray[np.uint8], size: int) -> Pixels:
    if array.shape == (size, size, 3) and array.dtype == np.uint8:
        return array
    return np.asarray(resampling.fit(Image.fromarray(array.squeeze(2) if array.shape[2:] == (1,) else array), 1, size))


def _decode_other(data: bytes, size: int) -> Pixels | str:
    """A format that the service does not accept, decoded by Pillow."""
    if not data:
        return "The file is empty."
    try:
        with Image.open(io.BytesIO(data), formats=OTHER_FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                return f"The image has {image.width} x {image.height} pixels; at most {MAX_PIXELS} are accepted."
            image.load()  # turns a TIFF as its orientation says, and removes the tag
            orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
            upright = _scaled(image) if image.mode == "F" else image
            return upright if isinstance(upright, str) else np.asarray(resampling.fit(upright, orientation, size))
    except UnidentifiedImageError:
        return f"The first bytes are of none of {', '.join([*FORMATS, *OTHER_FORMATS])}."
    except (Image.DecompressionBombError, SyntaxError, TypeError) as error:
        return _reason(error)


def _scaled(image: Image.Image) -> Image.Image | str:
    """A float picture with values from 0 to 1 as 8 bits; other ranges have no agreed meaning."""
    values = np.asarray(image)
    if not (np.isfinite(values).all() and values.min() >= 0 and values.max() <= 1):
        return "Its pixels are floating-point numbers beyond 0 to 1."
    return Image.fromarray((values * 255).round().astype(np.uint8))


def _reason(error: Exception) -> str:
    """One line without the path, so that equal reasons can be counted."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}."
    return " ".join(str(error).split())[:200] or type(error).__name__
