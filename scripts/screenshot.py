"""Takes the README's screenshot of the page: `make screenshot`."""

import argparse
import os
import tempfile
from pathlib import Path
from typing import Literal

from PIL import Image
from playwright.sync_api import sync_playwright

from benchmarks.server_process import ROOT, running, service

PORT = 18095
CHROMIUM = os.environ.get("CHROMIUM", "/usr/bin/chromium")
SHOWN = ("chelsea", "airplane", "bird", "deer", "dog", "frog", "horse", "ship")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m scripts.screenshot", description=__doc__)
    parser.add_argument("--file", type=Path, default=ROOT / "docs" / "images" / "screenshot.png")
    parser.add_argument("--width", type=int, default=1080, help="in CSS pixels; 360 is a phone [1080]")
    parser.add_argument("--scheme", choices=("light", "dark"), default="light")
    arguments = parser.parse_args()
    with running(service(PORT), PORT):
        take(f"http://127.0.0.1:{PORT}", arguments.file, arguments.width, arguments.scheme)


def take(url: str, file: Path, width: int, scheme: Literal["light", "dark"]) -> None:
    """The page with eight examples and one text file."""
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        notes = Path(folder) / "notes.txt"
        notes.write_text("no image")
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(
            viewport={"width": width, "height": 740},
            device_scale_factor=1.5,
            color_scheme=scheme,
            reduced_motion="reduce",
        )
        for _ in range(2):  # the first request is slower than the others
            page.goto(url)
            page.locator("#samples").wait_for()
            page.set_input_files("#files", [*(ROOT / "examples" / f"{name}.png" for name in SHOWN), notes])
            page.locator(".bars").nth(len(SHOWN) - 1).wait_for()
        page.screenshot(path=file, full_page=True)
        browser.close()
    Image.open(file).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(
        file, optimize=True
    )  # a third of the size


if __name__ == "__main__":
    main()
