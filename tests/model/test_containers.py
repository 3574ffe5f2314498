"""Header scans against Pillow's, and files reduced to what their pixels need."""

import io
import struct
import zlib
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo

from app.errors import RequestError, TooLarge, UndecodableImage
from app.model.containers import CONTAINERS, orientation, stream
from app.model.containers.stream import Stream
from app.model.preprocessing import SECONDS_PER_UNIT, EncodedImage, Limits, decode
from app.model.resampling import to_rgb
from tests.support.decompression_bombs import chunk
from tests.support.hostile_images import bmp, gif_with, interlaced_png, jpeg_scans, jpeg_with, png, segment

LIMITS = Limits(32, 25_000_000)
MODES = {
    "PNG": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"),
    "JPEG": ("L", "RGB", "CMYK"),
    "WEBP": ("RGB", "RGBA"),
    "BMP": ("1", "L", "P", "RGB", "RGBA"),
    "GIF": ("1", "L", "P", "RGB"),
}
OPTIONS: dict[str, tuple[dict[str, object], ...]] = {
    "PNG": ({}, {"compress_level": 0}),
    "JPEG": ({}, {"progressive": True}, {"subsampling": 2}, {"subsampling": 0}, {"restart_marker_rows": 1}),
    "WEBP": ({}, {"lossless": True}, {"exact": True, "lossless": True}),
    "BMP": ({},),
    "GIF": ({}, {"interlace": 0}, {"comment": b"c" * 700}),
}


def picture(mode: str, width: int, height: int) -> Image.Image:
    """A gradient with some noise, so that a shift or a turn shows."""
    across, down = np.meshgrid(np.arange(width), np.arange(height))
    noise = np.random.default_rng(0).integers(0, 40, (height, width))
    levels = np.stack([across * 3 + noise, down * 3 + noise, across + down], 2) % 256
    image = Image.fromarray(levels.astype(np.uint8))
    if mode == "I;16":
        return Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    if mode in ("LA", "RGBA"):
        image.putalpha(Image.fromarray((across * 5 % 256).astype(np.uint8)))
    return image.convert(mode)


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@st.composite
def files(draw: st.DrawFn, largest: int = 90) -> bytes:
    """Files of all formats, modes and options, with or without an orientation, still or animated."""
    kind = draw(st.sampled_from(sorted(MODES)))
    image = picture(draw(st.sampled_from(MODES[kind])), draw(st.integers(1, largest)), draw(st.integers(1, largest)))
    options = dict(draw(st.sampled_from(OPTIONS[kind])))
    if kind in ("PNG", "JPEG", "WEBP") and draw(st.booleans()):
        options["exif"] = exif(draw(st.integers(1, 8)))
    if kind in ("PNG", "WEBP", "GIF") and image.mode != "I;16" and draw(st.booleans()):
        options |= {"save_all": True, "append_images": [image.transpose(Image.Transpose.ROTATE_180)]}
    return saved(image, kind, **options)


def exif(turned: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0110] = "camera"
    tags[0x0112] = turned
    return tags


def reference(data: bytes) -> np.ndarray:
    """The contract in Pillow's own terms, without limits."""
    with Image.open(io.BytesIO(data)) as image:
        image.draft("RGB", (64, 64))
        upright = ImageOps.exif_transpose(image)
        rgb = to_rgb(upright)
        return np.asarray(ImageOps.fit(rgb, (32, 32), Image.Resampling.BICUBIC))


@given(files())
def test_scanned_size_equals_pillows(data: bytes) -> None:
    image = EncodedImage(data, LIMITS)
    with Image.open(io.BytesIO(data)) as opened:
        assert (image.width, image.height) == opened.size
        assert image.format == opened.format
    assert image.cost_s > image.width * image.height * SECONDS_PER_UNIT


@given(files())
def test_pixels_equal_pillows_for_ordinary_pictures(data: bytes) -> None:
    with Image.open(io.BytesIO(data)) as opened:
        if opened.format == "BMP" and opened.mode == "RGBA":
            return
    assert np.array_equal(decode(data, LIMITS).pixels, reference(data))


@pytest.mark.parametrize("height", [20, -20])
@pytest.mark.parametrize("header_bytes", [12, 40, 52, 56, 64, 108, 124])
def test_every_bmp_header_gives_its_size(header_bytes: int, height: int) -> None:
    if header_bytes == 12:
        header = struct.pack("<IHHHH", 12, 24, abs(height), 1, 24)
    else:
        header = struct.pack("<IiiHHIIiiII", header_bytes, 24, height, 1, 24, 0, 0, 0, 0, 0, 0)
        header += bytes(header_bytes - 40)
    data = b"BM" + struct.pack("<IHHI", 0, 0, 0, 14 + header_bytes) + header + bytes(72 * 20)
    image = EncodedImage(data, LIMITS)
    assert (image.width, image.height) == Image.open(io.BytesIO(data)).size == (24, 20)
    assert image.decode().resized_from == (24, 20)


@pytest.mark.parametrize(("bits", "colour", "channels"), [(1, 0, 1), (8, 2, 3), (16, 6, 4), (16, 4, 2)])
def test_interlaced_png_is_scanned_and_decoded(bits: int, colour: int, channels: int) -> None:
    image = EncodedImage(interlaced_png(41, 23, bits, colour, channels), LIMITS)
    assert (image.width, image.height) == (41, 23)
    assert image.decode().pixels.shape == (32, 32, 3)


def test_a_gif_frame_beyond_its_screen_widens_the_picture() -> None:
    data = bytearray(saved(picture("P", 50, 40), "GIF"))
    data[6:10] = struct.pack("<HH", 20, 60)
    image = EncodedImage(bytes(data), LIMITS)
    assert (image.width, image.height) == Image.open(io.BytesIO(bytes(data))).size == (50, 60)


@given(st.data())
def test_metadata_changes_no_pixel(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(("PNG", "JPEG", "GIF")))
    clean = saved(picture("RGB" if kind != "GIF" else "P", 40, 30), kind)
    content = data.draw(st.binary(max_size=200))
    if kind == "PNG":
        name = data.draw(st.sampled_from([b"tEXt", b"zTXt", b"iTXt", b"iCCP", b"eXIf", b"fcTL", b"prVt", b"gAMA"]))
        place, added = 33, chunk(name, content)
    elif kind == "JPEG":
        fill = b"\xff" * data.draw(st.integers(0, 5))
        place, added = 20, fill + segment(data.draw(st.sampled_from([0xE1, 0xE2, 0xED, 0xEE, 0xFE])), content)
        added = added.replace(b"Adobe", b"adobe")
    else:
        place, added = (
            13 + (3 << (clean[10] & 7) + 1),
            b"!\xfe" + bytes([len(content)]) * bool(content) + content + b"\0",
        )
    dirty = clean[:place] + added * data.draw(st.integers(1, 20)) + clean[place:]
    assert np.array_equal(decode(dirty, LIMITS).pixels, decode(clean, LIMITS).pixels)


def test_a_colour_profile_of_megabytes_is_skipped() -> None:
    clean = saved(picture("RGB", 40, 30), "PNG")
    profile = zlib.compress(np.random.default_rng(0).bytes(1_500_000), 1)
    dirty = clean[:33] + chunk(b"iCCP", b"k\0\0" + profile) + chunk(b"tEXt", b"k\0" + bytes(2_000_000)) + clean[33:]
    assert np.array_equal(decode(dirty, LIMITS).pixels, decode(clean, LIMITS).pixels)


@pytest.mark.parametrize("progressive", [False, True])
def test_a_motion_photo_shows_its_still(progressive: bool) -> None:
    """A JPEG with a video behind it, whose bytes hold more scan markers than a picture may have."""
    still = saved(picture("RGB", 640, 480), "JPEG", progressive=progressive)
    video = b"\0\0\0\x18ftypmp42" + (b"\xff\xda" + bytes(98)) * 5000
    assert np.array_equal(decode(still + video, LIMITS).pixels, decode(still, LIMITS).pixels)


@pytest.mark.parametrize("turned", range(1, 9))
@pytest.mark.parametrize("carrier", ["exif", "xmp", "xmp-deflated", "raw-profile", "raw-profile-deflated"])
def test_png_orientation_is_read_from_each_carrier(carrier: str, turned: int) -> None:
    packet = f'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="{turned}"/></x:xmpmeta>'
    raw = exif(turned).tobytes()
    profile = f"\nexif\n{len(raw):8}\n" + "\n".join(raw.hex()[i : i + 72] for i in range(0, 2 * len(raw), 72)) + "\n"
    info, options = PngInfo(), {}
    if carrier.startswith("xmp"):
        info.add_itxt("XML:com.adobe.xmp", packet, zip=carrier == "xmp-deflated")
    elif carrier.startswith("raw"):
        info.add_text("Raw profile type exif", profile, zip=carrier == "raw-profile-deflated")
    else:
        options = {"exif": raw}
    data = saved(picture("RGB", 50, 30), "PNG", pnginfo=info, **options)
    assert np.array_equal(decode(data, LIMITS).pixels, reference(data))
    assert CONTAINERS["PNG"](data).essential(LIMITS.work).orientation == turned


@given(parts=st.lists(st.binary(max_size=9), min_size=1), moves=st.lists(st.tuples(st.integers(-1, 20), st.booleans())))
def test_a_stream_reads_as_its_joined_parts(parts: list[bytes], moves: list[tuple[int, bool]]) -> None:
    joined = io.BytesIO(b"".join(parts))
    parted = Stream([memoryview(part) for part in parts], 60.0)
    length = len(joined.getvalue())
    for number, reads in moves:
        if reads:
            assert parted.read(number) == joined.read(number)
        else:
            place = min(max(number, 0), length)
            assert parted.seek(place) == joined.seek(place)
        assert parted.tell() == joined.tell()
    assert parted.seek(0, io.SEEK_END) == length
    assert parted.seek(-min(3, length), io.SEEK_CUR) == length - min(3, length)


def test_a_stream_ends_with_its_cpu_time() -> None:
    with pytest.raises(UndecodableImage, match="far more time"):
        Stream([b"data"], -1.0).read()


@pytest.mark.parametrize("place", [5, stream.WINDOW - 1, stream.WINDOW, 3 * stream.WINDOW + 7])
def test_a_needle_is_found_in_every_window(place: int) -> None:
    data = bytes(place) + b"\xff\xd9" + bytes(stream.WINDOW)
    assert stream.find(data, b"\xff\xd9", 0, len(data)) == place
    assert stream.find(data, b"\xff\xd9", 2, place + 1) == -1
    assert stream.find(data, b"\xff\xd9", place + 1, len(data)) == -1


def test_a_file_of_many_parts_is_decoded_as_one() -> None:
    """Over 64 kB, so that it is read in parts: a PNG of many IDAT chunks, as libpng writes it."""
    rows = np.random.default_rng(0).integers(0, 256, (300, 901), np.uint8)
    rows[:, 0] = 0
    whole = png(300, 300, 8, 2, rows.tobytes())
    idat = whole[41:-16]
    parts = b"".join(chunk(b"IDAT", idat[i : i + 8192]) for i in range(0, len(idat), 8192))
    split = whole[:33] + parts + chunk(b"IEND", b"")
    assert len(split) > 200_000
    assert np.array_equal(decode(split, LIMITS).pixels, reference(split))


@pytest.mark.parametrize("order", ["<", ">"])
def test_orientation_is_found_in_either_byte_order(order: str) -> None:
    mark = b"II" if order == "<" else b"MM"
    entry = struct.pack(order + "HHIHH", 0x0112, 3, 1, 8, 0)
    tiff = mark + struct.pack(order + "HI", 42, 8) + struct.pack(order + "H", 1) + entry
    assert orientation.from_exif(tiff) == orientation.from_exif(b"Exif\0\0" + tiff) == 8


@given(st.binary(max_size=100))
def test_broken_metadata_gives_no_orientation(data: bytes) -> None:
    for content in (data, b"II*\0" + data, b"Exif\0\0MM\0*" + data):
        assert orientation.from_exif(content) in {None, *range(1, 9)}
    assert orientation.from_xmp(data) is None
    assert orientation.from_raw_profile(data) is None
    assert len(orientation.inflated(data)) <= orientation.MAX_TEXT_BYTES


@given(kind=st.sampled_from(sorted(CONTAINERS)), rest=st.binary(max_size=60))
def test_any_bytes_behind_a_signature_end_in_a_clear_error(kind: str, rest: bytes) -> None:
    start = {"PNG": 16, "JPEG": 2, "GIF": 6, "WEBP": 12, "BMP": 2}[kind]
    with suppress(RequestError):
        EncodedImage(saved(picture("RGB", 8, 8), kind)[:start] + rest, LIMITS).decode()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (jpeg_with(segment(0xFE, b""), 4 * 600), "more than 512 segments"),
        (jpeg_with(b"\xff", 5000), "4096 fill bytes"),
        (jpeg_scans(101, 64, 64), "more than 100 scans"),
        (jpeg_scans(100, 3000, 2500), "too many scans for its size"),
        (gif_with(b"!\xfe\1c\0", 5 * 4096), "more than 4096 blocks"),
        (bmp(8, 8, 1, 8, b"\1\1\0\0" * 8), "run-length coded"),
        (bmp(8, 8, 2, 4, b"\1\1\0\0" * 8), "run-length coded"),
        (bmp(8, 8, 0, 8, bytes(64), colours=257), "palette of 257 colours"),
        (png(8, 8, 8, 0, bytes(72), before=chunk(b"abCd", b"") * 10_001), "more than 10000 chunks"),
    ],
)
def test_endless_headers_are_refused_with_the_limit(data: bytes, message: str) -> None:
    with pytest.raises(UndecodableImage, match=message):
        decode(data, LIMITS)


@pytest.mark.parametrize("marker", [0xC3, 0xC5, 0xC9, 0xCA, 0xCF])
def test_a_jpeg_of_a_rare_coding_is_refused_by_name(marker: int) -> None:
    data = saved(picture("RGB", 16, 16), "JPEG").replace(b"\xff\xc0", bytes([0xFF, marker]))
    with pytest.raises(UndecodableImage, match="lossless, hierarchical or arithmetic-coded"):
        decode(data, LIMITS)


def test_a_jpeg_of_twelve_bits_is_refused_by_name() -> None:
    data = bytearray(saved(picture("RGB", 16, 16), "JPEG"))
    data[data.index(b"\xff\xc0") + 4] = 12
    with pytest.raises(UndecodableImage, match="12 bits a sample"):
        decode(bytes(data), LIMITS)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (png(5000, 2917, 8, 2, b""), "at most 14583333 of a 24-bit PNG"),
        (png(5000, 2188, 8, 6, b""), "at most 10937500 of a 32-bit PNG"),
        (png(5000, 1094, 16, 6, b""), "at most 5468750 of a 64-bit PNG"),
        (png(5001, 5000, 8, 0, b""), "at most 25000000 are accepted"),
        (png(65_536, 1, 8, 0, b""), "a side has at most 65535 pixels"),
        (b"RIFF\0\0\0\0WEBPVP8X\x0a\0\0\0\0\0\0\0" + b"\xff\x0b\0" * 2, "at most 7575757 of a WebP"),
    ],
)
def test_pixels_beyond_a_formats_limit_are_refused(data: bytes, message: str) -> None:
    with pytest.raises(TooLarge, match=message):
        EncodedImage(data, LIMITS)


def test_higher_max_pixels_raises_every_formats_limit() -> None:
    assert EncodedImage(png(5000, 4001, 8, 2, b""), Limits(32, 50_000_000)).width == 5000


def test_a_jpeg_of_48_megapixels_is_decoded() -> None:
    data = saved(Image.new("RGB", (8000, 6000), (90, 120, 30)), "JPEG")
    image = EncodedImage(data, LIMITS)
    assert image.cost_s < 0.2
    assert image.decode().resized_from == (8000, 6000)


def test_a_progressive_jpeg_of_48_megapixels_is_refused() -> None:
    """Its coefficients would take 144 MB, all held at once."""
    data = saved(Image.new("RGB", (800, 600)), "JPEG", progressive=True)
    place = data.index(b"\xff\xc2") + 5
    large = data[:place] + struct.pack(">HH", 6000, 8000) + data[place + 4 :]
    with pytest.raises(TooLarge, match="of a progressive JPEG"):
        EncodedImage(large, LIMITS)
