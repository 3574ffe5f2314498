"""Pictures of every source become pixels, or a reason."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from training.datasets import pictures

PIXELS = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)


def encoded(image: Image.Image, kind: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM", "BMP"])
def test_lossless_formats_give_the_same_pixels(kind: str) -> None:
    assert np.array_equal(pictures.read(encoded(Image.fromarray(PIXELS), kind), 32), PIXELS)


@pytest.mark.parametrize("compression", ["tiff_lzw", "tiff_adobe_deflate", "packbits"])
def test_compressed_tiff_is_read(tmp_path: Path, compression: str) -> None:
    Image.fromarray(PIXELS).save(tmp_path / "x.TIF", "TIFF", compression=compression)
    assert np.array_equal(pictures.read(tmp_path / "x.TIF", 32), PIXELS)


def test_tiff_of_16_bits_and_floats_is_scaled_to_8() -> None:
    grey = PIXELS[..., 0]
    expected = grey[..., None].repeat(3, 2)
    assert np.array_equal(pictures.read(encoded(Image.fromarray(grey.astype(np.uint16) * 257), "TIFF"), 32), expected)
    floats = Image.fromarray(grey.astype(np.float32) / 255)
    assert np.array_equal(pictures.read(encoded(floats, "TIFF"), 32), expected)
    beyond = Image.fromarray(grey.astype(np.float32) + 1)
    assert pictures.read(encoded(beyond, "TIFF"), 32) == "Its pixels are floating-point numbers beyond 0 to 1."


def test_tiff_is_turned_as_its_orientation_says() -> None:
    exif = Image.Exif()
    exif[0x0112] = 3  # turned by 180 degrees
    buffer = io.BytesIO()
    Image.fromarray(PIXELS).save(buffer, "TIFF", exif=exif)
    assert np.array_equal(pictures.read(buffer.getvalue(), 32), PIXELS[::-1, ::-1])


@pytest.mark.parametrize("shape", [(32, 32), (32, 32, 1), (40, 32, 3), (32, 32, 4)])
def test_arrays_of_every_shape_are_read(shape: tuple[int, ...]) -> None:
    found = pictures.read(np.zeros(shape, np.uint8), 16)
    assert isinstance(found, np.ndarray)
    assert found.shape == (16, 16, 3)


def test_decoded_picture_of_a_library_is_read() -> None:
    assert np.array_equal(pictures.read(lambda: Image.fromarray(PIXELS), 32), PIXELS)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "The file is empty."),
        (b"hello", "The first bytes are of none of PNG, JPEG, WEBP, BMP, GIF, TIFF, PPM"),
        (encoded(Image.fromarray(PIXELS), "PNG")[:500], "The PNG data is broken or incomplete."),
        (b"II*\0" + b"\0" * 20, "The first bytes are of none of"),
        (encoded(Image.fromarray(PIXELS), "TIFF")[:500], ""),
    ],
)
def test_unreadable_bytes_give_a_reason_of_one_line(data: bytes, reason: str) -> None:
    found = pictures.read(data, 32)
    assert isinstance(found, str)
    assert found.startswith(reason)
    assert "\n" not in found


def test_reason_of_a_missing_file_has_no_path(tmp_path: Path) -> None:
    assert pictures.read(tmp_path / "gone.png", 32) == "No such file or directory."
    assert pictures.native_size(tmp_path / "gone.png") is None


@pytest.mark.skipif("AVIF" not in pictures.OTHER_FORMATS, reason="Pillow has no AVIF decoder here")
def test_damaged_avif_gives_a_reason() -> None:
    whole = encoded(Image.fromarray(PIXELS), "AVIF")
    pixels = whole.index(b"mdat") + 4
    for damaged in (whole[:pixels] + b"\xff" * (len(whole) - pixels), whole[:pixels]):
        assert isinstance(pictures.read(damaged, 32), str)
