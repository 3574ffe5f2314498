import io
import struct
import subprocess
import sys
import zlib
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo

from app.errors import RequestError, TooLarge, UndecodableImage, UnsupportedImage, WrongSize
from app.model.preprocessing import FORMATS, EncodedImage, Limits, decode, measure_slowdown
from app.model.resampling import fit, to_rgb
from app.model.signatures import sniff
from tests.conftest import EXAMPLES
from tests.support import decompression_bombs
from tests.support.hostile_images import bmp, empty_blocks_png, png

LIMITS = Limits(32, 10_000_000)


OTHER_KINDS = ("TIFF", "ICO", "PPM", "PDF", "EPS", "TGA", "DDS", "PCX", "JPEG2000", "AVIF", "SGI")


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def picture(mode: str = "RGB", size: tuple[int, int] = (32, 32)) -> Image.Image:
    return Image.open(EXAMPLES / "cat.png").convert(mode).resize(size)


def test_a_png_of_the_input_size_keeps_its_pixels(cat: bytes) -> None:
    decoded = decode(cat, LIMITS)
    assert decoded.resized_from is None
    assert np.array_equal(decoded.pixels, np.asarray(Image.open(io.BytesIO(cat))))


@pytest.mark.parametrize("kind", FORMATS)
def test_every_accepted_format_is_recognised_and_decoded(kind: str) -> None:
    data = encode(picture(), kind)
    assert sniff(data) == kind
    pixels = decode(data, LIMITS).pixels
    assert pixels.shape == (32, 32, 3)
    assert pixels.dtype == np.uint8
    assert np.abs(pixels.astype(int) - np.asarray(picture())).mean() < 12


OTHERS = {kind: encode(picture("RGB", (32, 32)), kind) for kind in OTHER_KINDS} | {
    "PSD": b"8BPS\0\1" + bytes(6) + struct.pack(">HIIHH", 3, 32, 32, 8, 3) + bytes(12) + bytes(2 + 3 * 32 * 32),
    "SVG": b'<svg xmlns="http://www.w3.org/2000/svg" width="32" height="32"/>',
    "HTML": b"<html><script>alert(1)</script></html>",
}
MAGIC = {"PNG": 8, "JPEG": 3, "GIF": 6, "WEBP": 12, "BMP": 2}  # bytes of a file that tell its format


@pytest.mark.parametrize("kind", OTHERS)
def test_other_formats_that_pillow_knows_never_reach_it(kind: str) -> None:
    with pytest.raises(UnsupportedImage):
        decode(OTHERS[kind], LIMITS)


@pytest.mark.parametrize("accepted", FORMATS)
@pytest.mark.parametrize("kind", OTHERS)
def test_other_formats_in_disguise_reach_no_other_decoder(kind: str, accepted: str) -> None:
    """Pillow tries all decoders where it may choose; with the first bytes of ours before theirs, none of them fits."""
    start = encode(picture(), accepted)[: MAGIC[accepted]]
    for disguised in (start + OTHERS[kind], start + OTHERS[kind][len(start) :]):
        with pytest.raises((UndecodableImage, TooLarge)):
            decode(disguised, LIMITS)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "I;16"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    kind = {"CMYK": "JPEG", "YCbCr": "JPEG", "PA": "GIF"}.get(mode, "PNG")
    source = picture("I") if mode == "I;16" else picture()
    image = source.convert(mode if mode != "PA" else "P")
    pixels = decode(encode(image, kind), LIMITS).pixels
    assert pixels.shape == (32, 32, 3)


def test_sixteen_bits_keep_their_brightness() -> None:
    ramp = (np.arange(32 * 32, dtype=np.uint16) * 64).reshape(32, 32)
    pixels = decode(encode(Image.fromarray(ramp), "PNG"), LIMITS).pixels
    assert np.array_equal(pixels[..., 0], (ramp >> 8).astype(np.uint8))


@pytest.mark.parametrize(("bits", "dark"), [(12, True), (10, True), (16, False), (14, False)])
def test_twelve_bits_in_sixteen_are_reported_as_dark(bits: int, dark: bool) -> None:
    ramp = np.linspace(0, (1 << bits) - 1, 64 * 64).astype(np.uint16).reshape(64, 64)
    assert decode(encode(Image.fromarray(ramp), "PNG"), LIMITS).dark_16_bit == dark


def test_black_and_eight_bit_pictures_are_not_reported() -> None:
    assert not decode(encode(Image.fromarray(np.zeros((32, 32), np.uint16)), "PNG"), LIMITS).dark_16_bit
    assert not decode(encode(Image.new("L", (32, 32), 3), "PNG"), LIMITS).dark_16_bit


@pytest.mark.parametrize("alpha", [0, 1])
def test_a_bmp_with_empty_alpha_is_opaque(alpha: int) -> None:
    masks = struct.pack("<IIII", 0xFF0000, 0xFF00, 0xFF, 0xFF000000)
    head = struct.pack("<IiiHHIIiiII", 56, 32, 32, 1, 32, 3, 0, 0, 0, 0, 0) + masks
    pixels = bytes([10, 20, 200, 0]) * 1023 + bytes([10, 20, 200, alpha])
    data = b"BM" + struct.pack("<IHHI", 70 + len(pixels), 0, 0, 70) + head + pixels
    expected = (200, 20, 10) if alpha == 0 else (255, 255, 255)
    assert (decode(data, LIMITS).pixels[16, 16] == expected).all()


def test_transparency_is_laid_over_white() -> None:
    clear = Image.new("RGBA", (32, 32), (255, 0, 0, 0))
    assert (decode(encode(clear, "PNG"), LIMITS).pixels == 255).all()
    palette = Image.new("P", (32, 32), 0)
    palette.putpalette([200, 0, 0] * 256)
    assert (decode(encode(palette, "PNG", transparency=0), LIMITS).pixels == 255).all()


def _turned(where: str) -> dict[str, object]:
    """Options of a picture's file that say, there, that it is turned clockwise for display."""
    if where == "exif":
        exif = Image.Exif()
        exif[0x0112] = 6
        return {"exif": exif}
    packet = '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    if where == "xmp":
        return {"xmp": packet.encode()}
    info = PngInfo()
    info.add_itxt("XML:com.adobe.xmp", packet)
    return {"pnginfo": info}


@pytest.mark.parametrize(
    ("kind", "where"),
    [("PNG", "exif"), ("JPEG", "exif"), ("WEBP", "exif"), ("PNG", "text"), ("JPEG", "xmp"), ("WEBP", "xmp")],
)
def test_the_files_orientation_is_applied(kind: str, where: str) -> None:
    image = Image.new("RGB", (32, 32), "black")
    image.paste("white", (0, 0, 32, 8))
    pixels = decode(encode(image, kind, **_turned(where)), LIMITS).pixels  # the top becomes the right
    assert pixels[:, 25:].min() > 200
    assert pixels[:, :23].max() < 50


def test_the_first_frame_of_an_animation_counts() -> None:
    frames = [Image.new("RGB", (32, 32), colour) for colour in ("red", "blue")]
    pixels = decode(encode(frames[0], "GIF", save_all=True, append_images=frames[1:]), LIMITS).pixels
    assert (pixels == (255, 0, 0)).all()


@given(width=st.integers(1, 200), height=st.integers(1, 200))
def test_any_size_is_cut_at_the_centre_and_reported(width: int, height: int) -> None:
    decoded = decode(encode(picture(size=(width, height)), "PNG"), LIMITS)
    assert decoded.pixels.shape == (32, 32, 3)
    assert decoded.resized_from == (None if (width, height) == (32, 32) else (width, height))


def test_the_sides_of_a_wide_picture_are_cut_off() -> None:
    wide = Image.new("RGB", (96, 32), "red")
    wide.paste("blue", (32, 0, 64, 32))
    pixels = decode(encode(wide, "PNG"), LIMITS).pixels
    assert (pixels[:, 2:-2] == (0, 0, 255)).all()


@pytest.mark.parametrize("size", [(1, 1), (10_000, 1), (1, 10_000)])
def test_extreme_shapes_are_answered(size: tuple[int, int]) -> None:
    assert decode(encode(Image.new("RGB", size, "green"), "PNG"), LIMITS).resized_from == size


def test_a_large_jpeg_is_close_to_its_exact_reduction() -> None:
    photo = Image.open(EXAMPLES / "chelsea.png").convert("RGB").crop((75, 0, 375, 300))
    large = photo.resize((1200, 1200), Image.Resampling.BICUBIC)
    got = decode(encode(large, "JPEG", quality=95), LIMITS).pixels
    exact = np.asarray(large.resize((32, 32), Image.Resampling.BICUBIC))
    assert np.abs(got.astype(int) - exact).mean() < 3


def gradient(mode: str, width: int, height: int) -> Image.Image:
    """A picture with large shapes and fine noise, in any mode, half of it transparent where the mode has alpha."""
    photo = Image.open(EXAMPLES / "chelsea.png").convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
    if mode == "I;16":
        return Image.fromarray(np.asarray(photo.convert("L")).astype(np.uint16) * 257)
    if mode in ("RGBA", "LA"):
        photo.putalpha(Image.radial_gradient("L").resize((width, height)))
    return photo.convert(mode)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"])
@pytest.mark.parametrize("size", [(1024, 1024), (1500, 1100), (1025, 4100), (5000, 900)])
def test_a_large_picture_differs_little_from_one_pass(mode: str, size: tuple[int, int]) -> None:
    image = gradient(mode, *size)
    got = decode(encode(image, "PNG", compress_level=1), Limits(32, 25_000_000)).pixels.astype(int)
    exact = np.asarray(ImageOps.fit(to_rgb(image), (32, 32), Image.Resampling.BICUBIC)).astype(int)
    assert np.abs(got - exact).max() <= 2
    assert np.abs(got - exact).mean() < 0.5


@pytest.mark.slow
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_large_picture_is_turned_as_a_small_one(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    large, small = (
        encode(gradient("RGB", *size), "PNG", exif=exif, compress_level=1) for size in ((1200, 1050), (600, 525))
    )
    difference = decode(large, LIMITS).pixels.astype(int) - decode(small, LIMITS).pixels
    assert np.abs(difference).mean() < 3


def test_other_input_sizes_of_large_pictures_are_exact_enough() -> None:
    image = gradient("RGBA", 3000, 2100)
    got = np.asarray(fit(image, 1, 224)).astype(int)
    exact = np.asarray(ImageOps.fit(to_rgb(image), (224, 224), Image.Resampling.BICUBIC)).astype(int)
    assert np.abs(got - exact).mean() < 1


def test_cost_grows_with_pixels_bytes_and_depth() -> None:
    sizes = [encode(Image.new("RGB", (side, side)), "PNG") for side in (32, 200, 2000)]
    costs = [EncodedImage(data, LIMITS).cost_s for data in sizes]
    assert costs == sorted(set(costs))
    assert 0.05 < EncodedImage(sizes[2], LIMITS).cost_s < 0.2
    deep, shallow = (encode(Image.new(mode, (200, 200)), "PNG") for mode in ("RGBA", "L"))
    assert EncodedImage(deep, LIMITS).cost_s > EncodedImage(shallow, LIMITS).cost_s
    assert EncodedImage(sizes[0] + bytes(1_000_000), LIMITS).cost_s > EncodedImage(sizes[0], LIMITS).cost_s + 0.008


def test_a_large_jpeg_counts_the_pixels_of_its_scale() -> None:
    image = EncodedImage(encode(picture(size=(1600, 1200)), "JPEG"), LIMITS)
    assert (image.width, image.height, image.decoded_pixels) == (1600, 1200, 200 * 150)
    assert EncodedImage(encode(picture(size=(160, 120)), "PNG"), LIMITS).decoded_pixels == 160 * 120


def test_only_small_files_of_few_pixels_are_cheap(cat: bytes) -> None:
    assert EncodedImage(cat, LIMITS).is_cheap
    assert EncodedImage(encode(picture(size=(64, 64)), "PNG"), LIMITS).is_cheap
    assert not EncodedImage(encode(picture(size=(65, 64)), "PNG"), LIMITS).is_cheap
    assert not EncodedImage(cat + bytes(40_000), LIMITS).is_cheap


def test_a_stream_made_to_be_slow_is_given_up() -> None:
    with pytest.raises(UndecodableImage, match="far more time to decode"):
        decode(empty_blocks_png(2000, 2000), LIMITS)
    with pytest.raises(UndecodableImage, match="far more compressed data than its pixels need"):
        decode(empty_blocks_png(32, 32), LIMITS)


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (b"\0\0\0\x18ftypheic" + bytes(40), "the file is HEIC"),
        (b"\0\0\0\x18ftypavif" + bytes(40), "the file is AVIF"),
        (b"II*\0" + bytes(40), "the file is TIFF"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "the file is SVG"),
        (b"iVBORw0KGgoAAAANSUhEUgAAACAAAAAg", "the file is base64 text of a PNG file"),
        (b"data:image/jpeg;base64,/9j/4AAQSkZJRgABAQAA", "the file is base64 text of a JPEG file"),
        (b"hello", "the first bytes are of none of them"),
    ],
)
def test_file_of_another_kind_is_named(data: bytes, found: str) -> None:
    with pytest.raises(UnsupportedImage, match=f"Send one of PNG.*{found}"):
        decode(data, LIMITS)


def test_png_for_ios_is_named() -> None:
    data = encode(picture(), "PNG")
    with pytest.raises(UndecodableImage, match="CgBI"):
        decode(data[:8] + decompression_bombs.chunk(b"CgBI", bytes(4)) + data[8:], LIMITS)


def test_negative_width_is_broken_and_not_too_large() -> None:
    data = encode(picture(), "BMP")
    with pytest.raises(UndecodableImage, match="broken"):
        decode(data[:18] + struct.pack("<i", -32) + data[22:], LIMITS)


def test_colour_key_lowers_the_limit_on_pixels() -> None:
    key = decompression_bombs.chunk(b"tRNS", bytes(6))
    with pytest.raises(TooLarge, match=r"at most 109\d{5} of a PNG with a transparent colour"):
        decode(png(5000, 2188, 8, 2, bytes(1), before=key), LIMITS._replace(max_pixels=25_000_000))


@pytest.mark.slow
def test_slow_machine_has_more_time_for_a_picture() -> None:
    assert 1 <= measure_slowdown() < 100
    data = empty_blocks_png(2000, 2000)
    with pytest.raises(UndecodableImage, match="broken or incomplete"):
        decode(data, LIMITS._replace(slowdown=100.0))


def test_poorly_compressed_data_is_no_flood() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (200, 601), np.uint8)
    noise[:, 0] = 0
    deflate = zlib.compressobj(9, zlib.DEFLATED, 15, 9, zlib.Z_FIXED)  # 9 bits for most bytes
    idat = decompression_bombs.chunk(b"IDAT", deflate.compress(noise.tobytes()) + deflate.flush())
    whole = png(200, 200, 8, 2, b"")
    data = whole[:33] + idat + decompression_bombs.chunk(b"IEND", b"")
    assert decode(data, LIMITS).resized_from == (200, 200)


def test_too_many_pixels_are_refused_before_decoding() -> None:
    with pytest.raises(TooLarge):
        decode(encode(Image.new("L", (2000, 2000)), "PNG"), Limits(32, 1_000_000))


def test_max_pixels_names_what_is_accepted() -> None:
    with pytest.raises(TooLarge, match="has 50 x 50 pixels; at most 2000 are accepted"):
        decode(encode(Image.new("RGB", (50, 50)), "PNG"), Limits(32, 2000))
    assert decode(encode(Image.new("RGB", (50, 40)), "PNG"), Limits(32, 2000)).resized_from == (50, 40)


def test_run_lengths_of_a_bmp_are_refused_at_once() -> None:
    with pytest.raises(UndecodableImage, match="run-length coded"):
        decode(bmp(25_000_000, 1, 1, 8, b"\1\1\0\0\0\1"), LIMITS)


def test_a_pixel_bomb_is_refused() -> None:
    bomb = bytearray(encode(Image.new("L", (8, 8)), "BMP"))
    bomb[18:26] = (60_000).to_bytes(4, "little") * 2
    with pytest.raises(TooLarge):
        decode(bytes(bomb), LIMITS)


def scans(count: int) -> bytes:
    """A progressive JPEG of 8 x 8 grey pixels whose many scans each say no more than that nothing changes."""

    def segment(marker: int, content: bytes) -> bytes:
        return bytes([0xFF, marker]) + struct.pack(">H", len(content) + 2) + content

    code = bytes([1] + [0] * 15)  # one symbol, one bit long
    tables = segment(0xDB, bytes([0] + [1] * 64)) + segment(0xC4, b"\x00" + code + b"\x00")
    head = segment(0xC2, struct.pack(">BHHB", 8, 8, 8, 1) + bytes([1, 0x11, 0])) + segment(
        0xC4, b"\x10" + code + b"\x00"
    )
    first = segment(0xDA, bytes([1, 1, 0, 0, 0, 0])) + b"\x7f"
    again = segment(0xDA, bytes([1, 1, 0, 1, 63, 0])) + b"\x7f"
    return b"\xff\xd8" + tables + head + first + again * (count - 1) + b"\xff\xd9"


def test_a_jpeg_of_endless_scans_is_refused_before_decoding() -> None:
    """Ten megabytes of them would keep a decoder busy for minutes, each going over all pixels."""
    assert decode(scans(100), LIMITS).resized_from == (8, 8)
    with pytest.raises(UndecodableImage, match="more than 100 scans"):
        decode(scans(101), LIMITS)


def test_a_progressive_jpeg_is_accepted() -> None:
    data = encode(picture(size=(640, 480)), "JPEG", progressive=True)
    assert decode(data, LIMITS).resized_from == (640, 480)


@pytest.mark.slow
def test_decompression_bombs_need_little_memory() -> None:
    """Deflate bombs in every chunk of a PNG that is inflated, and text without end; in a process of its own."""
    ended = subprocess.run(
        [sys.executable, "-m", "tests.support.decompression_bombs"],
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
    )
    grown_mb = {name: float(grown) for name, grown in (line.split() for line in ended.stdout.splitlines())}
    assert set(grown_mb) == {"IDAT", "zTXt", "iTXt", "iCCP", "zTXt-after", "tEXt", "many-zTXt", "eXIf", "all"}
    assert grown_mb["all"] < 100, grown_mb


def test_strict_size_accepts_only_the_input_size(cat: bytes) -> None:
    assert decode(cat, Limits(32, 10_000, strict_size=True)).resized_from is None
    with pytest.raises(WrongSize):
        decode(encode(picture(size=(33, 32)), "PNG"), Limits(32, 10_000, strict_size=True))


@pytest.mark.parametrize("kind", FORMATS)
def test_a_cut_off_file_is_undecodable(kind: str) -> None:
    data = encode(picture(size=(64, 64)), kind)
    with pytest.raises(UndecodableImage):
        decode(data[: len(data) // 2], LIMITS)


@given(kind=st.sampled_from(sorted(FORMATS)), share=st.floats(0, 1))
def test_a_file_cut_anywhere_ends_in_a_picture_or_a_clear_error(kind: str, share: float) -> None:
    data = encode(picture(), kind)
    with suppress(RequestError):
        assert decode(data[: int(share * len(data))], LIMITS).pixels.shape == (32, 32, 3)


@given(kind=st.sampled_from(sorted(FORMATS)), data=st.data())
def test_damaged_files_end_in_a_picture_or_a_clear_error(kind: str, data: st.DataObject) -> None:
    body = bytearray(encode(picture(), kind))
    for _ in range(data.draw(st.integers(1, 8))):
        body[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    with suppress(RequestError):
        assert decode(bytes(body), Limits(32, 100_000)).pixels.shape == (32, 32, 3)


@given(st.binary(max_size=200))
def test_noise_is_unsupported_or_undecodable(data: bytes) -> None:
    with pytest.raises((UnsupportedImage, UndecodableImage, TooLarge)):
        decode(data, LIMITS)
