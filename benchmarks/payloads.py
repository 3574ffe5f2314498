"""Image files and complete HTTP requests, made before a measurement."""

import io
from pathlib import Path

from PIL import Image

from benchmarks.server_process import ROOT

IMAGES_PER_BULK_REQUEST = 64

File = tuple[str, bytes]


def image_files(data: Path | None, count: int = 256) -> list[File]:
    """Three PNG for each JPEG: test images of a CIFAR-10 folder, or the examples repeated."""
    if data:
        from training import data as datasets  # needs torch, as the examples do not

        images = [Image.fromarray(pixels.numpy()) for pixels in datasets.load(data, 32).test.images[:count]]
    else:
        paths = sorted((ROOT / "examples").glob("*.png"))
        images = [Image.open(path).convert("RGB") for path in paths if path.stem != "chelsea"]  # not 32 x 32
        images = (images * count)[:count]
    return [_encode(i, image) for i, image in enumerate(images)]


def _encode(number: int, image: Image.Image) -> File:
    kind, options = ("jpeg", {"quality": 90}) if number % 4 == 3 else ("png", {})
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return f"{number}.{kind}", buffer.getvalue()


def forms(files: list[File], images: int = 1) -> list[bytes]:
    """Requests of `images` files each."""
    return [form(files[i : i + images]) for i in range(0, len(files), images)]


def form(files: list[File], path: str = "/predict") -> bytes:
    """An HTTP request that uploads the files as one multipart form."""
    body = b"".join(
        b'--BOUNDARY\r\nContent-Disposition: form-data; name="file"; filename="%s"\r\n'
        b"Content-Type: image/%s\r\n\r\n%s\r\n" % (name.encode(), name.rpartition(".")[2].encode(), data)
        for name, data in files
    )
    return post(body + b"--BOUNDARY--\r\n", "multipart/form-data; boundary=BOUNDARY", path)


def post(body: bytes, content_type: str, path: str = "/predict") -> bytes:
    lines = f"POST {path} HTTP/1.1", "Host: localhost", f"Content-Type: {content_type}", f"Content-Length: {len(body)}"
    return "\r\n".join([*lines, "", ""]).encode() + body
