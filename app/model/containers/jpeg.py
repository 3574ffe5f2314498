"""JPEG files: ITU-T T.81, with JFIF, EXIF and Adobe segments."""

import struct

from PIL import JpegImagePlugin

from app.errors import UndecodableImage
from app.model.containers import orientation
from app.model.containers.container import Container, Essential
from app.model.containers.stream import find

SOF_BASELINE, SOF_EXTENDED, SOF_PROGRESSIVE = 0xC0, 0xC1, 0xC2
DHT, JPG, DAC, EOI, SOS, DQT, DRI = 0xC4, 0xC8, 0xCC, 0xD9, 0xDA, 0xDB, 0xDD
APP0, APP1, APP14 = 0xE0, 0xE1, 0xEE  # JFIF, EXIF or XMP, Adobe
TABLES = {DHT, DQT, DRI}
FRAMES = {SOF_BASELINE, SOF_EXTENDED, SOF_PROGRESSIVE}
OTHER_FRAMES = set(range(0xC0, 0xD0)) - FRAMES - {DHT, JPG, DAC}
STANDALONE = {0x00, 0x01, *range(0xD0, 0xD9)}  # stuffing, TEM, restarts and SOI have no length
SCAN, END = b"\xff\xda", b"\xff\xd9"
FRAME = struct.Struct(">BHHB")
EXIF = b"Exif\0\0"
XMP = b"http://ns.adobe.com/xap/1.0/\0"

MAX_SEGMENTS = 512  # before the first scan; a colour profile or an extended XMP packet of 10 MB has 160
MAX_FILL = 4096  # bytes before a segment that belong to none
MAX_SCANS = 100  # a progressive file has about 10, and each is a pass over all coefficients
SAMPLES_PER_UNIT = 24  # entropy decoding of a sample, where the inverse transform is scaled
BUFFERED_SAMPLES_PER_UNIT = 2.5  # the same where all coefficients are kept: 2 bytes each, 125 MB at most
VISITS_PER_UNIT = 10  # coefficients that the scans of a progressive file go over


class Jpeg(Container):
    """Only the tables, the frame and the scans are kept. What stands behind the end of the image is dropped."""

    kind = "JPEG"
    plugin = JpegImagePlugin.JpegImageFile

    def __init__(self, data: bytes) -> None:
        self.data = data
        self._kept = [data[:2]]
        self._samples: list[tuple[int, int]] = []  # of each component: its identifier and how many it has
        self._seen: set[int] = set()
        self._metadata: dict[bytes, bytes] = {}
        self._scan = self._read_segments()
        if not self._samples:
            raise ValueError("no frame")
        self._buffered = self._progressive or data[self._scan + 4] < len(self._samples)

    @property
    def description(self) -> str:
        return "progressive JPEG" if self._buffered else self.kind

    def decoded_pixels(self, size: int) -> int:
        ratio = min(self.width, self.height) // (2 * size)
        scale = 8 if ratio >= 8 else 4 if ratio >= 4 else 2 if ratio >= 2 else 1  # as Pillow's draft() chooses
        return -(-self.width // scale) * -(-self.height // scale)

    def work(self, size: int) -> int:
        samples = sum(samples for _, samples in self._samples)
        entropy = samples / (BUFFERED_SAMPLES_PER_UNIT if self._buffered else SAMPLES_PER_UNIT)
        return int(entropy) + self.decoded_pixels(size)

    def essential(self, work_limit: int) -> Essential:
        end = find(self.data, END, self._scan, len(self.data))
        end = len(self.data) if end < 0 else end + 2
        if self._buffered:
            self._check_scans(end, work_limit)
        exif = orientation.from_exif(self._metadata.get(EXIF, b""))
        turned = exif or orientation.from_xmp(self._metadata.get(XMP, b"")) or orientation.UPRIGHT
        return Essential([b"".join(self._kept), memoryview(self.data)[self._scan : end]], turned)

    def _read_segments(self) -> int:
        """The place of the first scan's marker. Keeps what decoding needs of the segments before it."""
        data, place = self.data, 2
        for _ in range(MAX_SEGMENTS):
            marker, start = data[place + 1], place + 2
            if data[place] != 0xFF or marker == 0xFF:
                marker, start = self._marker(place)
            if marker == SOS:
                return start - 2
            if marker in STANDALONE:
                place = start
                continue
            place = start + (data[start] << 8 | data[start + 1])
            if marker == EOI or place < start + 2:
                raise ValueError("no scan")
            if marker in TABLES:
                self._kept.append(data[start - 2 : place])
            else:
                self._read_segment(marker, start, place)
        raise UndecodableImage(f"The JPEG has more than {MAX_SEGMENTS} segments before its first scan.")

    def _marker(self, place: int) -> tuple[int, int]:
        """The next marker from place on, behind fill bytes, and where its content starts."""
        place = self.data.index(b"\xff", place, place + MAX_FILL)
        rest = self.data[place : place + MAX_FILL]
        marker = rest.lstrip(b"\xff")
        if not marker:
            raise UndecodableImage(f"The JPEG has {MAX_FILL} fill bytes in a row, or ends with them.")
        return marker[0], place + len(rest) - len(marker) + 1

    def _read_segment(self, marker: int, start: int, end: int) -> None:
        if marker in FRAMES:
            self._read_frame(marker, start)
            self._kept.append(self.data[start - 2 : end])
        elif marker in OTHER_FRAMES:
            raise UndecodableImage("The JPEG is lossless, hierarchical or arithmetic-coded; send a Huffman-coded one.")
        elif marker in (APP0, APP14) and marker not in self._seen:
            self._seen.add(marker)
            self._kept.append(self.data[start - 2 : end])
        elif marker == APP1:
            for name in (EXIF, XMP):
                if name not in self._metadata and self.data.startswith(name, start + 2):
                    self._metadata[name] = self.data[start + 2 : end]

    def _read_frame(self, marker: int, start: int) -> None:
        bits, self.height, self.width, count = FRAME.unpack_from(self.data, start + 2)
        if bits != 8:
            raise UndecodableImage(f"The JPEG has {bits} bits a sample; 8 are accepted.")
        if self._samples or not (self.width and self.height and 1 <= count <= 4):
            raise ValueError("bad frame")
        names = self.data[start + 8 : start + 8 + 3 * count : 3]
        sampling = [(factors >> 4, factors & 15) for factors in self.data[start + 9 : start + 9 + 3 * count : 3]]
        across, down = (max(factors) for factors in zip(*sampling, strict=True))
        units = -(-self.width // (8 * across)) * -(-self.height // (8 * down))  # of interleaving
        self._samples = [(name, 64 * units * h * v) for name, (h, v) in zip(names, sampling, strict=True)]
        self._progressive = marker == SOF_PROGRESSIVE

    def _check_scans(self, end: int, work_limit: int) -> None:
        """Raises where the scans are too many, or go over too many coefficients. Each is a pass over its components."""
        visits = count = 0
        place = self._scan
        while 0 <= place < end:
            count += 1
            visits += self._visits(place)
            if count > MAX_SCANS:
                raise UndecodableImage(f"The JPEG has more than {MAX_SCANS} scans.")
            if visits > VISITS_PER_UNIT * work_limit:
                raise UndecodableImage("The progressive JPEG has too many scans for its size.")
            place = find(self.data, SCAN, place + 2, end)

    def _visits(self, place: int) -> int:
        """Coefficients that a scan may change."""
        count = self.data[place + 4] if place + 4 < len(self.data) else 0
        names = self.data[place + 5 : place + 5 + 2 * min(count, 4) : 2]
        samples = sum(samples for name, samples in self._samples if name in names)
        band = self.data[place + 5 + 2 * count : place + 7 + 2 * count]
        return samples * (max(0, band[1] - band[0]) + 1) // 64 if len(band) == 2 else samples
