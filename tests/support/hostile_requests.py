"""Requests that are costly for the event loop, each on a path of its own through the service."""

import gzip
import json
import zlib

from tests.support import decompression_bombs, hostile_images, raw_http
from tests.support.decompression_bombs import chunk
from tests.support.raw_http import CLOSE

PNG, FORM, GZIP = "image/png", "multipart/form-data; boundary=X", "Content-Encoding: gzip\r\n"
BIG_BYTES = 9_900_000  # the default MAX_FILE_BYTES is 10 MB
INLINE_BYTES = 60_000
MANY = 256  # files; the default MAX_FILES
DISPOSITION = b'Content-Disposition: form-data; name="file"'
V2 = "/v2/models/tiny/infer"


def request(target: str, body: bytes, content_type: str = PNG, headers: str = "") -> bytes:
    return raw_http.request(target, body, f"Content-Type: {content_type}\r\n{headers}{CLOSE}", "POST")


def form(files: list[bytes], parameters: bytes = b'; filename="a"') -> bytes:
    return (
        b"".join(b"--X\r\n" + DISPOSITION + parameters + b"\r\n\r\n" + data + b"\r\n" for data in files) + b"--X--\r\n"
    )


def headers_and_framing() -> dict[str, bytes]:
    chunks = request("/predict", b"", headers="Transfer-Encoding: chunked\r\n")
    fields = "".join(f"A{number}: {'x' * 300}\r\n" for number in range(90))
    return {
        "headers": request("/predict", b"", headers=fields),
        "one-byte chunks": chunks + b"1\r\na\r\n" * 20_000 + b"0\r\n\r\n",
        "pipelined requests": b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n" * 2000 + request("/healthz", b""),
        "line ends": b"\r\n" * 500_000 + request("/healthz", b""),
        "query": request("/predict?" + "top_k=1&" * 250, b"x"),
        "metrics": raw_http.request("/metrics", headers=CLOSE),
    }


def forms(cat: bytes) -> dict[str, bytes]:
    fields = b"".join(b'--X\r\nContent-Disposition: form-data; name="%d"\r\n\r\n\r\n' % i for i in range(5000))
    return {
        "many files": request("/predict?top_k=10", form([cat] * MANY), FORM),
        "many broken files": request("/predict", form([cat[:500]] * MANY), FORM),
        "large files": request("/predict", form([bytes(BIG_BYTES)] * 3), FORM),
        "large raw file": request("/predict", bytes(BIG_BYTES)),
        "many fields": request("/predict", fields, FORM),
        "many headers of a part": request("/predict", b"--X\r\n" + b"A: b\r\n" * 10_000, FORM),
        "encoded file names": request("/predict", form([b"x"] * MANY, b"; filename*=utf-8''" + b"%41" * 2600), FORM),
        "escaped file names": request("/predict", form([b"x"] * MANY, b'; filename="' + b"\\" * 7900), FORM),
        "nearly boundaries": request("/predict", form([b"\r\n--" * 2_000_000]), FORM),
        "compressed preamble": request("/predict", gzip.compress(b"\r\n" * 15_000_000), FORM, GZIP),
        "compressed files": request("/predict", gzip.compress(form([bytes(9_000_000)] * 3)), FORM, GZIP),
    }


def images() -> dict[str, bytes]:
    profile = b"Raw profile type exif\0\0" + zlib.compress(b"\n\n\n" + b"00\n" * 87_000)
    raw_exif = decompression_bombs.png(before=chunk(b"zTXt", profile))
    gif = hostile_images.gif_with(b"!\x01\0", 4000)
    scans = hostile_images.jpeg_scans(90, 64, 64)
    bmp = hostile_images.bmp(8, 8, 0, 8, bytes(64), colours=4096)
    return {
        "png texts": request("/predict", hostile_images.chunks_png(b"zTXt", b"k\0\0" + profile[23:], INLINE_BYTES)),
        "png raw profile": request("/predict", raw_exif),
        "png chunks": request("/predict", hostile_images.chunks_png(b"abCd", b"", INLINE_BYTES)),
        "jpeg fill bytes": request("/predict", hostile_images.jpeg_with(b"\xff", INLINE_BYTES)),
        "gif extensions": request("/predict", form([gif] * 8), FORM),
        "jpeg scans": request("/predict", form([scans[:4000]] * 8), FORM),
        "bmp palettes": request("/predict", form([bmp] * 8), FORM),
        "png empty blocks": request("/predict", form([hostile_images.empty_blocks_png(32, 32)[:8000]] * 8), FORM),
    }


def tensors() -> dict[str, bytes]:
    shape = [MANY, 32, 32, 3]
    tensor = {"name": "image", "datatype": "UINT8", "shape": shape, "data": [7] * (MANY * 3072)}
    deep = b'{"inputs":[{"name":"a","datatype":"UINT8","shape":[1],"data":' + b"[" * 4_900_000
    return {
        "json numbers": request(V2, json.dumps({"inputs": [tensor]}).encode(), "application/json"),
        "json nesting": request(V2, deep, "application/json"),
        "json keys": request(V2, b'{"inputs":[{' + b'"data":[1],' * 800_000, "application/json"),
    }


def all_requests(cat: bytes) -> dict[str, bytes]:
    return headers_and_framing() | forms(cat) | images() | tensors()
