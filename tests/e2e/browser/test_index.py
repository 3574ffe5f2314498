"""The page at /: choose, drop, paste, errors, retry, API key."""

import base64
import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import Locator, Page, expect

from tests.conftest import CLASSES, EXAMPLES
from tests.e2e.browser.conftest import Watch, check_accessible

Visit = Callable[..., tuple[Page, Watch]]
Start = Callable[..., httpx.Client]

CAT = EXAMPLES / "cat.png"
PHOTO = EXAMPLES / "chelsea.png"
TIMING = re.compile(r"^[\d.]+ ms: decoding [\d.]+, waiting [\d.]+, network [\d.]+$")


def cards(page: Page) -> Locator:
    return page.locator(".card")


def status(page: Page) -> Locator:
    return page.get_by_role("status")


def transfer(page: Page, *files: Path) -> object:
    """A DataTransfer with these files, as in a drop event."""
    contents = [(file.name, base64.b64encode(file.read_bytes()).decode()) for file in files]
    return page.evaluate_handle(
        """files => {
            const transfer = new DataTransfer();
            for (const [name, text] of files)
                transfer.items.add(new File([Uint8Array.from(atob(text), c => c.charCodeAt(0))], name));
            return transfer;
        }""",
        contents,
    )


def test_chosen_image_shows_its_classes(visit: Visit, client: httpx.Client) -> None:
    page, watch = visit(client)
    page.set_input_files("#files", PHOTO)
    card = cards(page)
    expect(card.locator("h3")).to_have_text(re.compile("|".join(CLASSES)))
    shown = card.locator(".bars li").all_inner_texts()
    assert len(shown) == 3
    shares = [float(re.search(r"([\d.]+) %", text).group(1)) for text in shown]
    assert all(a >= b for a, b in pairwise(shares))
    expect(card).to_contain_text("chelsea.png")
    expect(card).to_contain_text("resized from 451 \N{MULTIPLICATION SIGN} 300, cut at the centre")
    expect(page.locator(".batch header p")).to_have_text(TIMING)
    expect(status(page)).to_have_text(f"chelsea.png: {card.locator('h3').inner_text()}")
    assert watch.asked("/predict") == 1


def test_bar_length_is_the_probability(visit: Visit, client: httpx.Client) -> None:
    page, _ = visit(client)
    page.set_input_files("#files", CAT)
    row = cards(page).locator(".bars li").first
    share = float(row.locator("span").last.inner_text().removesuffix(" %"))
    widths = row.evaluate("row => [row.firstChild.offsetWidth, row.clientWidth]")
    assert widths[0] / widths[1] == pytest.approx(share / 100, abs=0.01)


def test_several_images_are_one_request_each_time(visit: Visit, client: httpx.Client) -> None:
    page, watch = visit(client)
    page.set_input_files("#files", [EXAMPLES / f"{name}.png" for name in CLASSES])
    expect(page.locator(".bars")).to_have_count(10)
    expect(status(page)).to_have_text("10 pictures classified.")
    assert page.locator(".name").all_inner_texts() == [f"{name}.png" for name in CLASSES]
    page.set_input_files("#files", [CAT])
    expect(page.locator(".bars")).to_have_count(11)
    expect(page.locator(".name").first).to_have_text("cat.png")
    assert watch.asked("/predict") == 2


def test_large_selection_is_split_into_requests(visit: Visit, start: Start) -> None:
    page, watch = visit(start(max_files=20))
    page.set_input_files("#files", [EXAMPLES / f"{CLASSES[i % 10]}.png" for i in range(70)])
    watch.expected = {413}
    expect(page.locator(".bars")).to_have_count(70)
    expect(status(page)).to_have_text("70 pictures classified.")
    assert page.locator(".name").all_inner_texts() == [f"{CLASSES[i % 10]}.png" for i in range(70)]


def test_dropped_images_are_classified(visit: Visit, client: httpx.Client) -> None:
    page, _ = visit(client)
    page.dispatch_event("main", "dragover", {"dataTransfer": transfer(page, CAT, PHOTO)})
    expect(page.locator("body")).to_have_class("dragging")
    page.dispatch_event("main", "drop", {"dataTransfer": transfer(page, CAT, PHOTO)})
    expect(page.locator("body")).not_to_have_class("dragging")
    expect(page.locator(".bars")).to_have_count(2)


def test_pasted_image_is_classified(visit: Visit, client: httpx.Client) -> None:
    page, _ = visit(client, permissions=["clipboard-read", "clipboard-write"])
    page.evaluate(
        """async () => {
            const blob = await (await fetch("static/samples/cat.png")).blob();
            await navigator.clipboard.write([new ClipboardItem({"image/png": blob})]);
        }"""
    )
    page.keyboard.press("Control+V")
    expect(page.locator(".bars")).to_have_count(1)
    expect(page.locator(".name")).to_have_text("image.png")


def test_samples_are_classified(visit: Visit, client: httpx.Client) -> None:
    page, watch = visit(client)
    page.get_by_role("button", name="sample chelsea.jpg").click()
    expect(page.locator(".bars")).to_have_count(1)
    page.get_by_role("button", name="All").click()
    samples = page.locator("#samples img").count()
    expect(page.locator(".bars")).to_have_count(1 + samples)
    assert watch.asked("/predict") == 2


def test_samples_match_the_classes_of_the_model(visit: Visit, client: httpx.Client) -> None:
    card = client.get("/model").json()
    page, _ = visit(client)
    expect(page.locator("#samples")).to_be_visible()
    page.route("**/model", lambda route: route.fulfill(json={**card, "classes": ["cat", "fish"]}))
    page.reload()
    expect(page.locator("#about")).to_contain_text("classes cat, fish.")
    names = [image.get_attribute("alt") for image in page.locator("#samples img").all()]
    assert names == ["sample chelsea.jpg", "sample cat.png"]


def test_bad_files_show_their_errors(visit: Visit, client: httpx.Client, notes: Path, tmp_path: Path) -> None:
    (tmp_path / "cut.png").write_bytes(CAT.read_bytes()[:700])
    (tmp_path / "empty.png").touch()
    page, _ = visit(client)
    page.set_input_files("#files", [CAT, notes, tmp_path / "cut.png", tmp_path / "empty.png", PHOTO])
    expect(status(page)).to_have_text("2 of 5 pictures classified; the others show an error.")
    assert cards(page).locator("h3").all_inner_texts()[1:4] == [
        "This is not a PNG, JPEG, WebP, BMP or GIF picture.",
        "This picture is damaged or incomplete.",
        "This file is empty.",
    ]
    check_accessible(page)


def test_several_bad_files_show_their_own_errors(visit: Visit, start: Start, notes: Path) -> None:
    page, watch = visit(start(max_pixels=2000))
    watch.expected = {413, 415}
    page.set_input_files("#files", [PHOTO, notes])
    expect(status(page)).to_have_text("0 of 2 pictures classified; the others show an error.")
    assert cards(page).locator("h3").all_inner_texts() == [
        "The upload is too large. The image has 451 x 300 pixels; at most 2000 are accepted.",
        "This is not a PNG, JPEG, WebP, BMP or GIF picture.",
    ]


@pytest.mark.parametrize(
    ("code", "slug", "words"),
    [
        (429, "queue-full", "The service is busy. Try again in 2 s."),
        (503, "not-ready", "The service is not ready. Try again in 2 s."),
        (502, "", "Unexpected response (status 502)."),
        (None, "", "The service cannot be reached."),
    ],
)
def test_failed_request_can_be_retried(
    visit: Visit, client: httpx.Client, code: int | None, slug: str, words: str
) -> None:
    page, watch = visit(client)
    problem = {"type": f"urn:thirtytwo:problem:{slug}", "title": "?", "detail": "?"}
    if code is None:
        page.route("**/predict*", lambda route: route.abort())
    elif slug:
        page.route("**/predict*", lambda route: route.fulfill(status=code, json=problem, headers={"Retry-After": "2"}))
    else:
        page.route("**/predict*", lambda route: route.fulfill(status=code, body="<h1>Bad Gateway</h1>"))
    watch.expected = {code or 0}
    page.set_input_files("#files", [CAT, PHOTO])
    expect(page.locator(".notice p")).to_have_text(words)
    expect(status(page)).to_have_text(words)
    expect(cards(page).locator("h3")).to_have_text(["not yet classified"] * 2)
    check_accessible(page)
    page.unroute("**/predict*")
    page.get_by_role("button", name="Try again").click()
    expect(page.locator(".bars")).to_have_count(2)
    expect(page.locator(".notice")).to_have_count(0)
    if code is None:
        watch.complaints.remove("Failed to load resource: net::ERR_FAILED")


def test_page_requests_the_api_key(visit: Visit, start: Start) -> None:
    page, watch = visit(start(api_keys="secret"))
    watch.expected = {401}
    page.set_input_files("#files", CAT)
    dialog = page.get_by_role("dialog", name="This service requires an API key")
    expect(dialog.get_by_label("API key")).to_be_focused()
    assert dialog.get_by_label("API key").get_attribute("type") == "password"
    check_accessible(page)
    page.keyboard.press("Escape")
    expect(page.locator(".notice p")).to_have_text("The service requires an API key.")
    page.get_by_role("button", name="Try again").click()
    expect(dialog.get_by_label("API key")).to_be_focused()
    page.keyboard.type("wrong")
    page.keyboard.press("Enter")
    expect(dialog.get_by_role("alert")).to_have_text("That key was not accepted.")
    page.keyboard.type("secret")
    page.keyboard.press("Enter")
    expect(page.locator(".bars")).to_have_count(1)
    page.set_input_files("#files", PHOTO)
    expect(page.locator(".bars")).to_have_count(2)
    assert page.context.cookies() == []
    assert page.evaluate("[localStorage.length, sessionStorage.length, document.getElementById('key').value]") == [
        0,
        0,
        "",
    ]
