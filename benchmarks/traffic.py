"""The mixed traffic of a soak test: valid, invalid, large, slow and abandoned requests in fixed shares."""

import asyncio
import io
import random
from collections.abc import Awaitable, Callable
from typing import NamedTuple

from PIL import Image

from benchmarks.client import Connection
from benchmarks.payloads import File, form, forms, image_files, post

PATHS = ("/readyz", "/healthz", "/model", "/metrics", "/", "/openapi.json")

ClientBehaviour = Callable[[Connection, bytes], Awaitable[int]]


async def normal(connection: Connection, request: bytes) -> int:
    return await connection.exchange(request)


async def slow_sender(connection: Connection, request: bytes) -> int:
    """Ten parts over two seconds."""
    step = len(request) // 10 + 1
    for start in range(0, len(request), step):
        connection.send(request[start : start + step])
        await asyncio.sleep(0.2)
    return await connection.status()


async def disconnect_mid_upload(connection: Connection, request: bytes) -> int:
    connection.send(request[: random.randrange(len(request))])
    await asyncio.sleep(random.random() * 0.1)
    connection.close()
    return 0


async def disconnect_mid_wait(connection: Connection, request: bytes) -> int:
    connection.send(request)
    await asyncio.sleep(random.random() * 0.01)
    connection.close()
    return 0


class TrafficKind(NamedTuple):
    """`weight`: share of a thousand requests; `status`: the expected one, 0 for clients that disconnect."""

    name: str
    weight: int
    status: int
    requests: list[bytes]
    behaviour: ClientBehaviour = normal


def traffic_kinds() -> list[TrafficKind]:
    files = image_files(None)
    single, many = forms(files), form(files[:64])
    return [
        *_valid(files, single, many),
        *_invalid(files, single),
        TrafficKind("disconnect during the upload", 35, 0, [*single, many], disconnect_mid_upload),
        TrafficKind("disconnect while waiting", 35, 0, [*single, many], disconnect_mid_wait),
    ]


def _valid(files: list[File], single: list[bytes], many: bytes) -> list[TrafficKind]:
    text, halves = ("notes.txt", b"no image"), _halves(files)
    mixed = [form([text, file, half]) for file, half in zip(files, halves, strict=True)]
    large = [post(_noise(kind, (2000, 1500)), "application/octet-stream") for kind in ("PNG", "JPEG", "WEBP")]
    gets = [f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode() for path in PATHS]
    return [
        TrafficKind("one image, form", 380, 200, single),
        TrafficKind("one image, raw", 190, 200, [post(data, "application/octet-stream") for _, data in files]),
        TrafficKind("64 images", 30, 200, [many]),
        TrafficKind("256 images", 5, 200, [form(files)]),
        TrafficKind("one valid file of three", 60, 200, mixed),
        TrafficKind("large image, 3 megapixels", 10, 200, large),
        TrafficKind("slow sender, 2 s", 35, 200, single, slow_sender),
        TrafficKind("other paths", 60, 200, gets),
    ]


def _invalid(files: list[File], single: list[bytes]) -> list[TrafficKind]:
    bomb = bytearray(_noise("BMP", (8, 8)))
    bomb[18:26] = (60_000).to_bytes(4, "little") * 2  # declared width and height
    bombs = [post(bytes(bomb), "image/bmp"), form([("bomb.bmp", bytes(bomb))])]
    oversized = post(b"", "image/png").replace(b"Content-Length: 0", b"Content-Length: 40000000")
    return [
        TrafficKind("broken form", 30, 400, [request[:-20] + b"x" * 20 for request in single]),
        TrafficKind("oversized body", 20, 413, [oversized]),
        TrafficKind("decompression bomb", 30, 413, bombs),
        TrafficKind("no image", 30, 415, [form([("notes.txt", b"no image")]), post(b"{}", "application/json")]),
        TrafficKind("truncated image", 30, 422, forms(_halves(files))),
        TrafficKind("top_k out of range", 20, 422, [form([file], "/predict?top_k=11") for file in files]),
    ]


def _halves(files: list[File]) -> list[File]:
    return [(name, data[: len(data) // 2]) for name, data in files]


def _noise(kind: str, size: tuple[int, int]) -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise(size, 50).convert("RGB").save(buffer, kind)
    return buffer.getvalue()
