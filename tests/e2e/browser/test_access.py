"""Accessibility: keyboard, screen reader, small screens, dark mode; and the checks that every browser test has."""

import re
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import Error as PlaywrightError
from playwright.sync_api import Page, expect

from tests.conftest import EXAMPLES
from tests.e2e.browser.conftest import Watch, check_accessible

Visit = Callable[..., tuple[Page, Watch]]

CAT = EXAMPLES / "cat.png"
PHOTO = EXAMPLES / "chelsea.png"
TEXT_CONTRAST = 4.5  # WCAG 2.2, level AA
PALETTE = [
    ("ink", "ground"), ("ink", "panel"), ("ink", "track"), ("ink", "bar"), ("soft", "ground"), ("soft", "panel"),
    ("soft", "track"), ("bad", "ground"), ("bad", "panel"), ("accent", "ground"), ("accent", "panel"),
    ("on-accent", "accent"),
]  # fmt: skip


def test_page_works_with_the_keyboard_only(visit: Visit, client: httpx.Client) -> None:
    page, _ = visit(client)
    expect(page.locator("#samples")).to_be_visible()
    for name in ("API", "Model card", "Choose pictures"):
        page.keyboard.press("Tab")
        focused = page.locator(":focus")
        assert name in (focused.inner_text() or page.locator("label", has_text=name).inner_text())
    expect(page.locator("#files")).to_be_focused()
    outline = "label => getComputedStyle(label).outlineStyle + getComputedStyle(label).outlineWidth"
    assert page.locator("#drop label").evaluate(outline) == "solid3px"
    with page.expect_file_chooser() as chooser:
        page.keyboard.press("Enter")
    assert chooser.value.is_multiple()
    chooser.value.set_files([CAT, PHOTO])
    expect(page.locator(".bars")).to_have_count(2)
    page.keyboard.press("Tab")
    page.keyboard.press("Space")
    expect(page.locator(".bars")).to_have_count(3)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1100])
def test_page_is_accessible_and_fits_the_screen(
    visit: Visit, client: httpx.Client, notes: Path, scheme: str, width: int
) -> None:
    page, _ = visit(client, color_scheme=scheme, viewport={"width": width, "height": 740})
    expect(page.locator("#samples")).to_be_visible()
    check_accessible(page)
    long_name = notes.with_name("a-very-long-name-" * 8 + ".png")
    long_name.write_bytes(PHOTO.read_bytes())
    page.set_input_files("#files", [CAT, notes, long_name])
    expect(page.locator(".bars")).to_have_count(2)
    check_accessible(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= width


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_palette_has_sufficient_contrast(visit: Visit, client: httpx.Client, scheme: str) -> None:
    page, _ = visit(client, color_scheme=scheme)

    def luminance(name: str) -> float:
        colour = page.evaluate(
            """name => {
                const probe = document.body.appendChild(document.createElement("i"));
                probe.style.color = `var(--${name})`;
                return getComputedStyle(probe).color;
            }""",
            name,
        )
        channels = [int(c) / 255 for c in re.fullmatch(r"rgb\((\d+), (\d+), (\d+)\)", colour).groups()]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    ground = luminance("ground")
    assert ground < 0.05 if scheme == "dark" else ground > 0.8
    for text, behind in PALETTE:
        dark, light = sorted((luminance(text), luminance(behind)))
        assert (light + 0.05) / (dark + 0.05) >= TEXT_CONTRAST, (text, behind)


def test_watch_records_errors_and_outside_requests(visit: Visit, client: httpx.Client) -> None:
    page, watch = visit(client)
    page.evaluate("fetch('http://127.0.0.2/').catch(() => {})")
    page.evaluate("document.body.setAttribute('style', 'color: red')")
    expect(page.locator("#samples")).to_be_visible()
    assert all("Content Security Policy" in text for text in watch.complaints)
    assert len(watch.complaints) >= 2
    with page.expect_event("pageerror"):
        page.evaluate("setTimeout(() => { throw new Error('astray'); })")
    with pytest.raises(PlaywrightError):
        page.goto("http://127.0.0.2/")
    assert "astray" in watch.complaints[-1]
    assert watch.outside[-1] == "http://127.0.0.2/"
    watch.complaints.clear()
    watch.outside.clear()
