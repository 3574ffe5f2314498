"""An audit of a folder with known faults, as data, page and command."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from app.errors import DataError
from training.audit import __main__ as command
from training.audit import duplicates, findings, page
from training.audit.duplicates import Pair
from training.audit.findings import Findings
from training.datasets.discovery import open_listing


def embed(pixels: np.ndarray) -> np.ndarray:
    """Mean colours of 4 x 4 blocks."""
    return pixels.astype(np.float32).reshape(len(pixels), 4, 8, 4, 8, 3).mean((2, 4)).reshape(len(pixels), -1)


@pytest.fixture
def faulty(tmp_path: Path) -> Path:
    """One leak, one conflict, three broken files, a black and a grey picture; names with Markdown's characters."""
    generator = np.random.default_rng(0)
    root = tmp_path / "a|b"

    def save(name: str, pixels: np.ndarray) -> None:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)

    noise = generator.integers(0, 256, (14, 32, 32, 3), dtype=np.uint8)
    for i in range(6):
        save(f"train/<cat>/{i}.png", noise[i])
        save(f"train/$dog$/{i}.png", noise[i + 6])
    save("train/$dog$/also_cat.png", noise[0])
    save("train/<cat>/black.png", np.zeros((40, 50, 3), np.uint8))
    save("test/<cat>/leaked.png", noise[1])
    save("test/<cat>/new.png", noise[12])
    save("test/$dog$/grey.png", np.full((32, 32, 3), 130, np.uint8))
    for name in ("one", "two"):
        (root / "train" / "<cat>" / f"{name}.png").write_bytes(b"")
    (root / "train" / "<cat>" / "notes.txt").write_text("hello")
    return root


@pytest.fixture
def found(faulty: Path) -> Findings:
    with open_listing(faulty) as listing:
        return findings.audit(listing, 32, embed)


def test_faults_are_found(found: Findings) -> None:
    content = findings.as_json(found)
    assert content["classes"] == {"train": {"$dog$": 7, "<cat>": 7}, "test": {"$dog$": 1, "<cat>": 2}}
    assert {reason: each["count"] for reason, each in content["unreadable"].items()} == {
        "The file is empty.": 2,
        "The first bytes are of none of PNG, JPEG, WEBP, BMP, GIF, TIFF, PPM, AVIF.": 1,
    }
    assert content["identical"]["leaked"] == {"test": 1}
    assert len(content["identical"]["groups"]) == 2
    assert [{each["label"] for each in pair} for pair in content["two_labels"]] == [{"<cat>", "$dog$"}]
    assert {each["kind"] for each in content["empty"]} == {"nearly black", "one colour"}
    assert content["sizes"]["largest"] == [50, 40]
    assert content["sizes"]["different"] == 2


def test_cut_list_of_near_duplicates_is_noted(found: Findings) -> None:
    line = "the list of near duplicates was cut at 200,000 pairs; there are probably others"
    assert line not in page.overview(found)
    assert not findings.as_json(found)["near_duplicates"]["cut"]
    cut = found._replace(near=[Pair(0, 1, 3, 0.99)] * duplicates.MAX_PAIRS)
    assert line in page.overview(cut)


def test_page_and_json_are_written(found: Findings, tmp_path: Path) -> None:
    page.write(tmp_path / "out", found)
    text = (tmp_path / "out" / "audit.md").read_text()
    assert "- 4 pictures with an identical partner; 1 test pictures have one in train" in text
    assert "| 2 | The file is empty. | train/&lt;cat&gt;/one.png, train/&lt;cat&gt;/two.png |" in text
    assert r"\$dog\$" in text
    for name in ("identical", "two-labels", "empty"):
        assert f"]({name}.png)" in text
        with Image.open(tmp_path / "out" / f"{name}.png") as sheet:
            assert sheet.width > 64
    assert not (tmp_path / "out" / "near-duplicates.png").exists()
    assert json.loads((tmp_path / "out" / "audit.json").read_text())["name"] == "a|b"


def test_data_without_a_readable_picture_give_one_line(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.png").write_bytes(b"")
    with open_listing(tmp_path) as listing, pytest.raises(DataError, match=r"no readable picture.*file is empty"):
        findings.audit(listing, 32, embed)


@pytest.mark.slow
def test_command_prints_the_findings(faulty: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command.main(["--data", str(faulty), "--out", str(tmp_path / "out")])
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "image folder: 14 train, 3 test pictures of 2 classes"
    assert "3 unreadable files" in printed
    assert (tmp_path / "out" / "audit.md").exists()
    with pytest.raises(SystemExit, match=r"DataError: .*gone does not exist\."):
        command.main(["--data", str(tmp_path / "gone")])
