"""`python -m app classify`."""

import asyncio
import csv
import io
import json
import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import cast

import pytest

from app.commands import classify
from app.commands.image_files import Source
from app.errors import UndecodableImage
from app.inference.pipeline import Classification, Deadline, Pipeline
from app.settings import Settings
from tests.conftest import EXAMPLES, serving
from tests.support.subprocesses import command


@pytest.mark.slow
def test_text_has_one_line_per_file(capsys: pytest.CaptureFixture[str]) -> None:
    files = [str(EXAMPLES / f"{name}.png") for name in ("cat", "frog")]
    assert classify.run(files) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(": ")[0] for line in lines] == files
    assert lines[0].partition(": ")[2].startswith("cat ")
    assert lines[0].count("%") == 3


@pytest.mark.slow
def test_cascade_is_classified_as_by_the_service(cascade_weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photo = EXAMPLES / "cat.png"
    assert classify.run(["--json", "--top-k", "10", "--weights", str(cascade_weights), str(photo)]) == 0
    top = json.loads(capsys.readouterr().out)["top"]
    with serving(Settings(weights=cascade_weights)) as client:
        response = client.post("/predict", params={"top_k": 10}, files={"file": photo.read_bytes()})
    assert response.json()["predictions"][0]["top"] == top


def run_process(
    weights: Path, *arguments: str | bytes | Path, stdin: bytes | None = None, env: Mapping[str, str] | None = None
) -> "subprocess.CompletedProcess[bytes]":
    """As a process, with file names as bytes."""
    line = [os.fsencode(part) for part in (*command("classify", "--weights", str(weights)), *arguments)]
    return subprocess.run(line, input=stdin, env=env, capture_output=True, timeout=100, check=False)


def test_json_is_the_contracts(tiny_weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photo = str(EXAMPLES / "chelsea.png")
    assert classify.run(["--json", "--top-k", "99", "--weights", str(tiny_weights), photo]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["resized_from"] == [451, 300]
    assert len(answer["top"]) == 10
    assert answer["label"] == answer["top"][0]["label"]
    assert answer["confidence"] == answer["top"][0]["probability"]


@pytest.fixture
def mixed(tmp_path: Path) -> list[str]:
    """A text file, a missing file, an image."""
    notes = tmp_path / "notes.txt"
    notes.write_text("no picture")
    return [str(notes), str(tmp_path / "none.png"), str(EXAMPLES / "cat.png")]


def test_bad_files_are_reported_beside_the_others(
    tiny_weights: Path, mixed: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert classify.run(["--weights", str(tiny_weights), *mixed]) == 1
    written = capsys.readouterr()
    assert [line.partition(": ")[0] for line in written.out.splitlines()] == mixed[2:]
    assert [line.partition(": ")[0] for line in written.err.splitlines()] == mixed[:2]


def test_json_has_bad_files_in_order(tiny_weights: Path, mixed: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert classify.run(["--json", "--weights", str(tiny_weights), *mixed]) == 1
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["file"] for row in rows] == mixed
    assert rows[0]["error"]["type"] == "urn:thirtytwo:problem:unsupported-image"
    assert rows[1]["error"]["detail"] == "No such file or directory."
    assert "label" in rows[2]


def test_csv_has_one_row_per_file(tiny_weights: Path, mixed: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert classify.run(["--csv", "--top-k", "2", "--weights", str(tiny_weights), *mixed]) == 1
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert list(rows[0]) == ["file", "label_1", "probability_1", "label_2", "probability_2", "ood_score", "error"]
    assert [row["file"] for row in rows] == mixed
    assert rows[1]["error"] == "No such file or directory."
    assert rows[2]["error"] == ""
    assert float(rows[2]["probability_1"]) >= float(rows[2]["probability_2"])


@pytest.mark.slow
def test_out_of_distribution_is_shown_in_every_format(ood_weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def printed(*flags: str) -> str:
        assert classify.run([*flags, "--weights", str(ood_weights), str(EXAMPLES / "cat.png")]) == 0
        return capsys.readouterr().out

    assert printed().endswith(", out of distribution\n")
    assert json.loads(printed("--json"))["ood"] is True
    assert next(csv.DictReader(io.StringIO(printed("--csv"))))["ood_score"] == "1.0000"


@pytest.mark.slow
def test_folders_are_searched_in_sorted_order(
    tiny_weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ["b/2.PNG", "b/10.png", "a.png", "c/d/e.png", "c/.hidden.png", "c/notes.txt"]
    for name in names:
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(EXAMPLES / "cat.png", file)
    (tmp_path / "empty").mkdir()
    (tmp_path / "c" / "loop").symlink_to(tmp_path)
    assert classify.run(["--weights", str(tiny_weights), str(tmp_path)]) == 0
    found = [line.partition(": ")[0] for line in capsys.readouterr().out.splitlines()]
    assert found == [str(tmp_path / name) for name in ("a.png", "b/10.png", "b/2.PNG", "c/d/e.png")]
    assert classify.run(["--weights", str(tiny_weights), str(tmp_path / "empty")]) == 1
    assert capsys.readouterr().err == f"{tmp_path / 'empty'}: The folder has no images.\n"


@pytest.mark.slow
def test_many_files_keep_their_order_and_results(
    tiny_weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """More than all chunks that are under way at once."""
    examples = sorted(EXAMPLES.glob("*.png"))
    files = [str(examples[i % len(examples)]) for i in range(600)]
    assert classify.run(["--json", "--weights", str(tiny_weights), *files]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["file"] for row in rows] == files
    for i, row in enumerate(rows):
        assert row["label"] == rows[i % len(examples)]["label"]


def test_images_beyond_a_requests_pixels_are_classified(
    tiny_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("THIRTYTWO_MAX_PIXELS", "200000")
    monkeypatch.setenv("THIRTYTWO_MAX_REQUEST_PIXELS", "200000")
    photo = str(EXAMPLES / "chelsea.png")
    assert classify.run(["--weights", str(tiny_weights), photo, photo, photo]) == 0
    monkeypatch.setenv("THIRTYTWO_MAX_FILE_BYTES", "1000")
    assert classify.run(["--weights", str(tiny_weights), photo]) == 1
    assert "more than 1000 bytes" in capsys.readouterr().err


@pytest.mark.slow
def test_names_that_are_not_utf_8(tiny_weights: Path, tmp_path: Path) -> None:
    name = os.fsencode(tmp_path) + b"/caf\xe9\nx.png"
    shutil.copy(EXAMPLES / "cat.png", name)
    for environment in ({}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}):
        env = os.environ | environment
        text = run_process(tiny_weights, name, env=env)
        assert (text.returncode, text.stderr) == (0, b"")
        assert text.stdout.startswith(os.fsencode(tmp_path) + b"/caf\xe9\\x0ax.png: ")
        row = json.loads(run_process(tiny_weights, "--json", tmp_path, env=env).stdout)
        assert row["file"] == f"{tmp_path}/caf\\xe9\nx.png"
        missing = run_process(tiny_weights, name + b"?", env=env)
        assert missing.stderr == os.fsencode(tmp_path) + b"/caf\xe9\\x0ax.png?: No such file or directory.\n"


@pytest.mark.slow
def test_standard_input_is_one_image(tiny_weights: Path, cat: bytes) -> None:
    ended = run_process(tiny_weights, "-", stdin=cat)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.startswith(b"-: ")


@pytest.mark.slow
def test_reader_that_leaves_causes_no_traceback(tiny_weights: Path) -> None:
    files = [str(EXAMPLES / "cat.png")] * 3000
    arguments = command("classify", "--csv", "--weights", str(tiny_weights), *files)
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as running:
        assert running.stdout is not None
        assert running.stderr is not None
        assert running.stdout.readline().startswith(b"file,")
        running.stdout.close()
        assert running.wait(100) == 0
        assert running.stderr.read() == b""


@pytest.mark.slow
def test_full_disk_under_the_output_is_one_line(tiny_weights: Path) -> None:
    with Path("/dev/full").open("w") as full:
        arguments = command("classify", "--weights", str(tiny_weights), str(EXAMPLES / "cat.png"))
        ended = subprocess.run(arguments, stdout=full, stderr=subprocess.PIPE, text=True, timeout=100, check=False)
    assert ended.returncode == 2
    assert ended.stderr == "error: the output cannot be written: No space left on device\n"


def test_failure_of_one_image_leaves_the_others() -> None:
    class FailingPipeline:
        async def classify(self, files: list[bytes], deadline: Deadline) -> Classification:
            if b"bad" in files:
                raise ArithmeticError("not finite")
            return Classification([UndecodableImage(file.decode()) for file in files], 0.0, 0.0)

    sources = [Source(name, name.encode()) for name in ("a", "bad", "c")]
    outcomes = asyncio.run(classify.classify_chunk(sources, cast(Pipeline, FailingPipeline())))
    assert [str(outcome) for outcome in outcomes] == ["a", "not finite", "c"]


@pytest.mark.parametrize("arguments", [[], ["--top-k", "0", "x"], ["--json", "--csv", "x"]])
def test_wrong_arguments_exit_with_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        classify.run(arguments)


def test_missing_weights_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert classify.run(["--weights", str(tmp_path / "none"), str(EXAMPLES / "cat.png")]) == 2
    assert capsys.readouterr().err.startswith("error: ")
