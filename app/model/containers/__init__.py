"""The accepted image formats: header scans with bounded work, and files reduced to what their pixels need."""

from app.model.containers.bmp import Bmp
from app.model.containers.container import Container
from app.model.containers.gif import Gif
from app.model.containers.jpeg import Jpeg
from app.model.containers.png import Png
from app.model.containers.webp import WebP

CONTAINERS: dict[str, type[Container]] = {each.kind: each for each in (Png, Jpeg, WebP, Bmp, Gif)}
