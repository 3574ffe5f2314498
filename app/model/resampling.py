"""Pictures of any mode and size to RGB of the input size, without a copy of a large one."""

import numpy as np
from PIL import Image, ImageOps

REDUCED_SIDE = 512  # pixels of the shorter side, or 4 input sizes, that block averages leave of a large picture
LARGE_AREA = 1 << 22  # pixels from which on a picture is never copied as a whole
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


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode Pillow decodes to, as RGB: alpha over white, 16 bits to 8."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):
        return _eight_bit(image).convert("RGB")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return image.convert("RGB")


def fit(image: Image.Image, orientation: int, size: int) -> Image.Image:
    """Upright, RGB, size x size: scaled, antialiased, and cut at the centre to a square.

    Where the shorter side is at least 2 * REDUCED_SIDE, or the area beyond LARGE_AREA, the picture is averaged over
    blocks first; a value then differs by 1 of 255, rarely by more, from one pass over all pixels.
    """
    factor = max(1, min(image.size) // max(REDUCED_SIDE, 4 * size))
    if factor > 1 or image.width * image.height > LARGE_AREA:
        return _upright(_fit_large(image, factor, size), orientation)
    rgb = to_rgb(_upright(image, orientation))
    return rgb if rgb.size == (size, size) else ImageOps.fit(rgb, (size, size), Image.Resampling.BICUBIC)


def _fit_large(image: Image.Image, factor: int, size: int) -> Image.Image:
    """RGB, size x size, from averages of factor x factor pixels, converted in strips.

    Pillow's `resize(reducing_gap=...)` makes the same averages of the same region, but of a picture in RGB already.
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
    if image.mode.startswith("I"):
        image = _eight_bit(image)
    elif image.has_transparency_data:
        image = image if image.mode in ("LA", "RGBA") else image.convert("RGBA")
    elif image.mode not in ("L", "RGB"):
        image = image.convert("RGB")
    return to_rgb(image.reduce(factor))


def _eight_bit(image: Image.Image) -> Image.Image:
    """The high bytes of 16-bit greyscale; Pillow's own conversion clips at 255."""
    values = np.asarray(image)
    values = values if image.mode.startswith("I;16") else values.clip(0, 65535)
    return Image.fromarray((values >> 8).astype(np.uint8))


def _upright(image: Image.Image, orientation: int) -> Image.Image:
    """The picture as it is meant to be seen, by its EXIF orientation of 1 to 8."""
    method = TRANSPOSITIONS.get(orientation)
    return image if method is None else image.transpose(method)
