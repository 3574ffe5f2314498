"""Image files of one colour."""

import io

from PIL import Image


def png(width: int, height: int, colour: str = "green") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), colour).save(buffer, "PNG")
    return buffer.getvalue()


SMALL, LARGE = png(32, 32), png(1500, 1000)  # cheap to decode on the event loop; decoded in a thread
WHITE = png(32, 32, "white")  # triggers the fault of tests.support.fault_injection
