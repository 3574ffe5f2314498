"""Groups of prefix codes of lossless WebP files, against what libwebp's encoder may write."""

import io
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from app.errors import RequestError, UndecodableImage
from app.model.containers import vp8l
from app.model.containers.webp import MAX_GROUPS, WebP
from app.model.preprocessing import Limits, decode
from tests.support.hostile_images import webp_prefix_codes

LIMITS = Limits(32, 25_000_000)
VP8L_CONTENT = 20  # bytes before it in a file with nothing else


def photo(width: int, height: int, colours: int = 0) -> Image.Image:
    across, down = np.meshgrid(np.arange(width), np.arange(height))
    noise = np.random.default_rng(0).integers(0, 8, (height, width))
    levels = np.stack([across * 255 // width + noise, down * 255 // height + noise, noise], 2) % 256
    image = Image.fromarray(levels.astype(np.uint8))
    return image.quantize(colours).convert("RGB") if colours else image


def webp(image: Image.Image, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", **options)
    return buffer.getvalue()


def groups(data: bytes) -> list[int]:
    file = WebP(data)
    return list(file._groups(12, len(data), file.width, file.height))


@pytest.mark.parametrize("method", [0, 4, 6])
@pytest.mark.parametrize("colours", [0, 2, 4, 14, 200])
def test_groups_are_blocks_of_the_picture(method: int, colours: int) -> None:
    """A misread bit in the transforms before it makes another number of it."""
    width, height = 317, 211
    (count,) = groups(webp(photo(width, height, colours), lossless=True, method=method, quality=90))
    packed = {-(-width // pixels) for pixels in (1, 2, 4, 8)}
    possible = {-(-across // 2**bits) * -(-height // 2**bits) for across in packed for bits in range(2, 10)}
    assert count in possible | {1}
    assert count <= 2600  # of libwebp's encoder


def test_groups_of_every_stream_are_counted() -> None:
    image = photo(300, 300)
    frames = webp(image, save_all=True, append_images=[image.transpose(Image.Transpose.ROTATE_90)], lossless=True)
    (first,) = groups(frames)
    assert first > 1
    image.putalpha(Image.effect_noise((300, 300), 50))
    (alpha,) = groups(webp(image, quality=50))
    assert alpha >= 1
    assert groups(webp(photo(300, 300), quality=50)) == []


@pytest.mark.parametrize("height", [512, 1024])
def test_files_of_very_many_groups_are_refused(height: int) -> None:
    data = webp_prefix_codes(1024, height)
    with pytest.raises(UndecodableImage, match=f"{256 * height // 4} groups of prefix codes; at most {MAX_GROUPS}"):
        decode(data, LIMITS)
    frame = b"ANMF" + (len(data) - 12 + 16).to_bytes(4, "little") + bytes(6) + b"\xff\3\0\xff\3\0" + bytes(4)
    canvas = b"VP8X\x0a\0\0\0\2\0\0\0\xff\3\0\xff\3\0ANIM\6\0\0\0" + bytes(6)
    animated = canvas + frame + data[12:]
    with pytest.raises(UndecodableImage, match="groups of prefix codes"):
        decode(b"RIFF" + (len(animated) + 4).to_bytes(4, "little") + b"WEBP" + animated, LIMITS)


def test_groups_behind_very_many_chunks_are_refused() -> None:
    data = webp_prefix_codes(1024, 512)
    canvas = b"VP8X\x0a\0\0\0\0\0\0\0\xff\3\0\xff\1\0" + b"ABCD\0\0\0\0" * 2000
    with pytest.raises(UndecodableImage, match="more than 1000 chunks"):
        decode(b"RIFF" + (len(canvas) + len(data) - 8).to_bytes(4, "little") + b"WEBP" + canvas + data[12:], LIMITS)


def test_large_transforms_are_refused() -> None:
    """A predictor for blocks of 4 x 4 pixels."""
    with pytest.raises(UndecodableImage, match="transform of 65536 blocks"):
        vp8l.count_groups(memoryview(bits((0x2F, 8), (1023, 14), (1023, 14), (0, 4), (1, 1), (0, 2), (0, 3))))


def test_repeated_transforms_are_refused() -> None:
    with pytest.raises(ValueError, match="twice"):
        vp8l.count_groups(memoryview(bits((0x2F, 8), (1023, 14), (1023, 14), (0, 4), (1, 1), (2, 2), (1, 1), (2, 2))))


def bits(*fields: tuple[int, int]) -> bytes:
    value = place = 0
    for field, length in fields:
        value |= field << place
        place += length
    return value.to_bytes(place // 8 + 1, "little")


STREAM = webp(photo(90, 70), lossless=True, method=6)


@given(place=st.integers(VP8L_CONTENT + 5, len(STREAM) - 1), noise=st.binary(min_size=1, max_size=4))
def test_damaged_streams_raise_known_errors(place: int, noise: bytes) -> None:
    damaged = STREAM[:place] + noise + STREAM[place + len(noise) :]
    with suppress(UndecodableImage, ValueError):
        assert vp8l.count_groups(memoryview(damaged)[VP8L_CONTENT:]) >= 1


@given(data=st.binary(max_size=300))
def test_noise_raises_known_errors(data: bytes) -> None:
    with suppress(UndecodableImage, ValueError):
        vp8l.count_groups(memoryview(b"\x2f" + data))
    vp8l_file = b"RIFF\0\0\0\0WEBPVP8L" + len(data).to_bytes(4, "little") + b"\x2f\xff\xc3\xff\0" + data
    with suppress(RequestError):
        decode(vp8l_file, LIMITS)
