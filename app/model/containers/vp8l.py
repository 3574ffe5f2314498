"""How many groups of prefix codes a lossless WebP bit stream may have: RFC 9649, section 3.

libwebp builds tables of 5.6 kB for each group, up to 65,536 of them, and has no limit to set. Their number stands
behind the images of the transforms, which have to be read to find it.
"""

from collections.abc import Sequence

from app.errors import UndecodableImage

SIGNATURE = 0x2F
PREDICTOR, CROSS_COLOR, SUBTRACT_GREEN, COLOR_INDEXING = range(4)
LITERALS, LENGTHS, DISTANCES = 256, 24, 40  # symbols
CODE_LENGTH_ORDER = (17, 18, 0, 1, 2, 3, 4, 5, 16, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)
MAX_CODE_BITS = 15
MAX_BLOCKS = 32_768  # of a transform: 8 megapixels in blocks of 16 x 16, in 50 ms

Code = list[tuple[int, int] | None]  # by the next bits, as many as the longest code word has: symbol, bits of its word


class BitReader:
    """Bits from the least significant one of each byte on; zeros behind the end, as libwebp reads them."""

    def __init__(self, data: memoryview) -> None:
        self._data = data
        self._place = 0
        self._value = self._count = 0

    def read(self, count: int) -> int:
        self._fill()
        value = self._value & (1 << count) - 1
        self._value >>= count
        self._count -= count
        return value

    def symbol(self, code: Code) -> int:
        self._fill()
        entry = code[self._value & len(code) - 1]
        if entry is None:
            raise ValueError("no code word")
        symbol, bits = entry
        self._value >>= bits
        self._count -= bits
        return symbol

    def _fill(self) -> None:
        if self._count < 32:
            if self._place > len(self._data) + 8:
                raise ValueError("the stream ends early")
            self._value |= int.from_bytes(self._data[self._place : self._place + 8], "little") << self._count
            self._place += 8
            self._count += 64


def count_groups(stream: memoryview) -> int:
    """The most groups that a VP8L chunk may have. Raises UndecodableImage, or ValueError where it is broken."""
    bits = BitReader(stream)
    if bits.read(8) != SIGNATURE:
        raise ValueError("no signature")
    width, height = bits.read(14) + 1, bits.read(14) + 1
    bits.read(4)  # alpha and version
    return _count_groups(bits, width, height)


def count_alpha_groups(stream: memoryview, width: int, height: int) -> int:
    """The same of an ALPH chunk, whose bit stream has no header."""
    is_compressed = bool(stream) and stream[0] & 3 == 1
    return _count_groups(BitReader(stream[1:]), width, height) if is_compressed else 0


def _count_groups(bits: BitReader, width: int, height: int) -> int:
    kinds: set[int] = set()
    while bits.read(1):
        kind = bits.read(2)
        if kind in kinds:
            raise ValueError("a transform twice")
        kinds.add(kind)
        if kind in (PREDICTOR, CROSS_COLOR):
            _skip_image(bits, _blocks(bits.read(3) + 2, width, height))
        elif kind == COLOR_INDEXING:
            colours = bits.read(8) + 1
            _skip_image(bits, colours)
            pixels = 8 if colours <= 2 else 4 if colours <= 4 else 2 if colours <= 16 else 1  # in one
            width = -(-width // pixels)
    if bits.read(1):
        bits.read(4)  # size of the colour cache
    return _blocks(bits.read(3) + 2, width, height) if bits.read(1) else 1


def _blocks(size_bits: int, width: int, height: int) -> int:
    return -(-width >> size_bits) * -(-height >> size_bits)


def _skip_image(bits: BitReader, pixels: int) -> None:
    if pixels > MAX_BLOCKS:
        raise UndecodableImage(f"The WebP has a transform of {pixels} blocks; at most {MAX_BLOCKS} are accepted.")
    cached = 1 << bits.read(4) if bits.read(1) else 0
    green, *others, distance = (
        _read_code(bits, symbols) for symbols in (LITERALS + LENGTHS + cached, *[LITERALS] * 3, DISTANCES)
    )
    while pixels > 0:
        symbol = bits.symbol(green)
        if symbol < LITERALS:
            for code in others:
                bits.symbol(code)
        elif symbol < LITERALS + LENGTHS:
            pixels -= _read_number(bits, symbol - LITERALS) - 1
            _read_number(bits, bits.symbol(distance))
        pixels -= 1


def _read_number(bits: BitReader, symbol: int) -> int:
    if symbol < 4:
        return symbol + 1
    extra = symbol - 2 >> 1
    return (2 + (symbol & 1) << extra) + bits.read(extra) + 1


def _read_code(bits: BitReader, symbols: int) -> Code:
    if bits.read(1):
        count = bits.read(1) + 1
        first = bits.read(8 if bits.read(1) else 1)
        used = sorted([first, bits.read(8)] if count == 2 else [first])
        return [(symbol, count - 1) for symbol in used]
    lengths = [0] * len(CODE_LENGTH_ORDER)
    for place in CODE_LENGTH_ORDER[: 4 + bits.read(4)]:
        lengths[place] = bits.read(3)
    return _code(_read_lengths(bits, _code(lengths), symbols))


def _read_lengths(bits: BitReader, code: Code, symbols: int) -> list[int]:
    left = 2 + bits.read(2 + 2 * bits.read(3)) if bits.read(1) else symbols
    lengths: list[int] = []
    previous = 8
    while len(lengths) < symbols and left:
        left -= 1
        symbol = bits.symbol(code)
        if symbol <= MAX_CODE_BITS:
            lengths.append(symbol)
            previous = symbol or previous
        elif symbol == MAX_CODE_BITS + 1:
            lengths += [previous] * (bits.read(2) + 3)
        else:
            lengths += [0] * (bits.read(3) + 3 if symbol == 17 else bits.read(7) + 11)
    return lengths[:symbols]


def _code(lengths: Sequence[int]) -> Code:
    """The canonical code; a single symbol has a word of no bits."""
    used = sorted((length, symbol) for symbol, length in enumerate(lengths) if length)
    if len(used) == 1:
        return [(used[0][1], 0)]
    longest = used[-1][0] if used else 0
    code: Code = [None] * (1 << longest)
    word = 0
    for length, symbol in used:
        if word >= 1 << longest:
            raise ValueError("too many code words")
        start = int(f"{word:0{longest}b}"[::-1], 2)
        code[start :: 1 << length] = [(symbol, length)] * (1 << longest - length)
        word += 1 << longest - length
    return code
