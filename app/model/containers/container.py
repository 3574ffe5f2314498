"""An image file whose header has been read: what every format has in common."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, NamedTuple

from PIL import ImageFile

from app.model.containers.stream import Part


class Essential(NamedTuple):
    """The file without metadata, in parts, and the EXIF orientation of its metadata (1 to 8; 1 is upright)."""

    parts: Sequence[Part]
    orientation: int


class Container(ABC):
    """The header of one image file. The constructor does bounded work: no loop over more than a few hundred items.

    Constructors raise UndecodableImage, or struct.error, IndexError or ValueError where the bytes end early.
    """

    kind: ClassVar[str]
    plugin: ClassVar[type[ImageFile.ImageFile]]

    data: bytes
    width: int
    height: int
    bit_depth: int = 8

    @abstractmethod
    def __init__(self, data: bytes) -> None: ...

    @property
    def description(self) -> str:
        """The kind of file to which a limit on pixels applies."""
        return self.kind

    def decoded_pixels(self, size: int) -> int:
        """Pixels that the decoder writes where the picture is needed at size x size."""
        return self.width * self.height

    def work(self, size: int) -> int:
        """CPU time and memory of decoding, in pixels of 20 ns and 6 bytes each, at the worst for such a header."""
        return self.decoded_pixels(size)

    @abstractmethod
    def essential(self, work_limit: int) -> Essential:
        """The file with its pixels only. Raises UndecodableImage where decoding them exceeds work_limit."""
