"""GIF files: the GIF89a specification."""

import struct

from PIL import GifImagePlugin

from app.errors import UndecodableImage
from app.model.containers import orientation
from app.model.containers.container import Container, Essential

EXTENSION, IMAGE, TRAILER, GRAPHIC_CONTROL = 0x21, 0x2C, 0x3B, 0xF9
WORK_PER_PIXEL = 1.2  # 20 megapixels of noise take 0.27 s
MAX_BLOCKS = 4096  # before the first frame; a comment or an XMP packet of 1 MB


class Gif(Container):
    """The first frame on its screen. Comments and application data before it are dropped."""

    kind = "GIF"
    plugin = GifImagePlugin.GifImageFile

    def __init__(self, data: bytes) -> None:
        self.data = data
        width, height, flags = struct.unpack_from("<HHB", data, 6)
        self._head_end = 13 + (3 << (flags & 7) + 1 if flags & 0x80 else 0)
        self._control = b""
        self._frame = self._find_frame(self._head_end)
        left, top, columns, rows = struct.unpack_from("<HHHH", data, self._frame + 1)
        self.width, self.height = max(width, left + columns), max(height, top + rows)

    def work(self, size: int) -> int:
        return int(WORK_PER_PIXEL * self.width * self.height)

    def essential(self, work_limit: int) -> Essential:
        head = self.data[: self._head_end] + self._control
        return Essential([head, memoryview(self.data)[self._frame :]], orientation.UPRIGHT)

    def _find_frame(self, place: int) -> int:
        """The place of the first image descriptor. Raises UndecodableImage past MAX_BLOCKS."""
        data = self.data
        in_extension = False
        for _ in range(MAX_BLOCKS):
            byte = data[place]
            if in_extension:
                in_extension = byte != 0
                place += byte + 1
            elif byte == IMAGE:
                return place
            elif byte == TRAILER:
                raise ValueError("no frame")
            elif byte == EXTENSION:
                if data[place + 1] == GRAPHIC_CONTROL and data[place + 2] == 4:
                    # the transparent index alone; how the frame is disposed of matters to the next one only
                    self._control = b"!\xf9\4" + bytes([data[place + 3] & 1, 0, 0, data[place + 6], 0])
                in_extension = True
                place += 2
            else:
                place += 1
        raise UndecodableImage(f"The GIF has more than {MAX_BLOCKS} blocks before its first frame.")
