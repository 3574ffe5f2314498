"""Coverage-guided fuzzing of the decoder: `python -m tests.fuzz.decoding -runs=20000 [FOLDER]`; flags are libFuzzer's.

The corpus is a small file of every format and mode. Any result but an image of the right shape or a RequestError stops
the run with the failing file. Coverage includes our header scans and Pillow's Python, not the C of its decoders.
"""

import io
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["app.model", "PIL"]):
    from PIL import Image

    from app.errors import RequestError
    from app.model.preprocessing import FORMATS, Limits, decode

    Image.init()  # imports the plugins now; Pillow would import them on first use, without instrumentation

LIMITS = Limits(32, 65_536)
MODES = {"PNG": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"), "JPEG": ("L", "RGB", "CMYK"), "WEBP": ("RGB", "RGBA")}


def check(data: bytes) -> None:
    with suppress(RequestError):
        picture = decode(data, LIMITS)
        assert picture.pixels.shape == (32, 32, 3), picture.pixels.shape


def seeds(folder: Path) -> None:
    """Writes a file of every format in every mode, plain and animated or progressive."""
    image = Image.effect_noise((24, 20), 60)
    animated = {"save_all": True, "append_images": [image.rotate(90)]}
    more = {"JPEG": {"progressive": True, "exif": orientation()}, "BMP": {}}
    for kind in FORMATS:
        for mode in MODES.get(kind, ("L", "P", "RGB")):
            converted = image.convert("I").convert(mode) if mode == "I;16" else image.convert(mode)
            for name, options in (("plain", {}), ("more", more.get(kind, animated))):
                buffer = io.BytesIO()
                converted.save(buffer, kind, **options)
                (folder / f"{kind}-{mode.replace(';', '')}-{name}").write_bytes(buffer.getvalue())


def orientation() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        seeds(Path(folder))
        atheris.Setup([*sys.argv, folder], check)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
