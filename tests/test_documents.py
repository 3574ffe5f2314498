"""The documents name what exists: links, tests, errors, metrics and pages."""

import re
from pathlib import Path

import pytest

from app.errors import RequestError
from app.model import weights

ROOT = Path(__file__).parents[1]
PAGES = sorted(path.relative_to(ROOT) for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
LINK = re.compile(r"\]\(([^)#\s]*)(?:#([^)\s]+))?\)")


def read(page: Path | str) -> str:
    return (ROOT / page).read_text()


def anchors(text: str) -> set[str]:
    """Anchors of the headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_links_lead_somewhere(page: Path) -> None:
    for target, anchor in LINK.findall(read(page)):
        if target.startswith(("http:", "https:")):
            continue
        linked = (ROOT / page).parent / target if target else ROOT / page
        assert linked.exists(), f"{page} links to {target}"
        assert not anchor or anchor in anchors(linked.read_text()), f"{page} links to {target}#{anchor}"


def test_index_links_every_page() -> None:
    index = read("docs/index.md") + read("docs/experiments/README.md")
    linked = {Path(target).name for target, _ in LINK.findall(index)}
    assert {page.name for page in PAGES if page.parts[0] == "docs"} - {"index.md"} <= linked


def test_readme_has_at_most_110_lines() -> None:
    assert len(read("README.md").splitlines()) <= 110


def test_api_page_lists_every_error() -> None:
    rows = re.findall(r"^\| (\d{3}) \| `([a-z-]+)` \|", read("docs/api.md"), re.MULTILINE)
    errors = {(str(kind.status), kind.type) for kind in RequestError.__subclasses__()}
    assert set(rows) == errors | {("500", "internal")}


@pytest.mark.parametrize("page", ["docs/reliability.md", "docs/architecture.md", "CONTRIBUTING.md"])
def test_paths_named_in_documents_exist(page: str) -> None:
    paths = re.findall(r"`((?:app|training|tests|benchmarks|scripts|deploy|docs)/[\w./-]*)`", read(page))
    assert paths
    assert [path for path in paths if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("page", ["README.md", "docs/model-card.md"])
def test_figures_are_those_of_the_bundled_file(page: str) -> None:
    loaded, text = weights.load(weights.BUNDLED), read(page)
    results = loaded.card.results
    for accuracy in (results["test_accuracy"], results["test_jpeg80_accuracy"]):
        assert f"{accuracy:.2%}".replace("%", " %") in text
    assert loaded.version in text
