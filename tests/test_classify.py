"""`python -m app classify`."""

import json
from pathlib import Path

import pytest

from app import classify
from app.settings import Settings
from tests.conftest import EXAMPLES, serving


def test_a_line_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    files = [str(EXAMPLES / f"{name}.png") for name in ("cat", "frog")]
    assert classify.run(files) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(": ")[0] for line in lines] == files
    assert lines[0].partition(": ")[2].startswith("cat ")
    assert lines[0].count("%") == 3


def test_cascade_is_classified_as_by_the_service(cascade_weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photo = EXAMPLES / "cat.png"
    assert classify.run(["--json", "--top-k", "10", "--weights", str(cascade_weights), str(photo)]) == 0
    top = json.loads(capsys.readouterr().out)["top"]
    with serving(Settings(weights=cascade_weights)) as client:
        response = client.post("/predict", params={"top_k": 10}, files={"file": photo.read_bytes()})
    assert response.json()["predictions"][0]["top"] == top


def test_json_is_the_contracts(tiny_weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photo = str(EXAMPLES / "chelsea.png")
    assert classify.run(["--json", "--top-k", "99", "--weights", str(tiny_weights), photo]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["resized_from"] == [451, 300]
    assert len(answer["top"]) == 10


def test_a_bad_file_does_not_spoil_the_rest(
    tiny_weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    notes = tmp_path / "notes.txt"
    notes.write_text("no picture")
    missing = str(tmp_path / "none.png")
    assert classify.run(["--weights", str(tiny_weights), str(notes), missing, str(EXAMPLES / "cat.png")]) == 1
    said = capsys.readouterr()
    assert len(said.out.splitlines()) == 1
    assert [line.partition(": ")[0] for line in said.err.splitlines()] == [str(notes), missing]


def test_missing_weights_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert classify.run(["--weights", str(tmp_path / "none"), str(EXAMPLES / "cat.png")]) == 2
    assert capsys.readouterr().err.startswith("error: ")
