"""BMP files: the headers of OS/2 and of Windows."""

import struct

from PIL import BmpImagePlugin

from app.errors import UndecodableImage
from app.model.containers import orientation
from app.model.containers.container import Container, Essential

CORE_HEADER = 12  # of OS/2 1.x: sizes of 16 bits, no compression
RUN_LENGTHS = {1, 2}
MAX_COLOURS = 256  # of a palette, each a turn of a loop in Pillow


class Bmp(Container):
    """Bottom-up or top-down, without run lengths, which Pillow decodes pixel by pixel in Python."""

    kind = "BMP"
    plugin = BmpImagePlugin.BmpImageFile

    def __init__(self, data: bytes) -> None:
        self.data = data
        (header,) = struct.unpack_from("<I", data, 14)
        if header == CORE_HEADER:
            self.width, self.height = struct.unpack_from("<HH", data, 18)
            return
        self.width, height, _, bits, compression = struct.unpack_from("<iiHHI", data, 18)
        self.height = abs(height)
        if self.width < 0:
            raise ValueError("negative width")
        (colours,) = struct.unpack_from("<I", data, 46)
        if compression in RUN_LENGTHS:
            raise UndecodableImage("The BMP is run-length coded; save it without compression, or as PNG.")
        if bits <= 8 and colours > MAX_COLOURS:
            raise UndecodableImage(f"The BMP has a palette of {colours} colours; at most {MAX_COLOURS} are accepted.")

    def essential(self, work_limit: int) -> Essential:
        return Essential([self.data], orientation.UPRIGHT)
