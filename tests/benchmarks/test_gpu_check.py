"""`make gpu-check` on a CPU: every part runs to its end, and a part that fails or hangs costs itself only."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import __main__ as gpu_check
from benchmarks.gpu.table import write_table

FINDINGS = {
    "versions": {"machine", "cuda"},
    "references": {"reference"},
    "rates": {"eager", "prepared", "graph"},
    "serving": {"service started", "load"},
    "faults": {"SIGTERM under load", "device-side assert"},
    "short": {"short run", "torchrun"},
    "steps": {"training images", "augmentation", "same batches", "step"},
    "full": {"full run"},
}


def check(parts: str, out: Path, **environment: str) -> list[dict[str, Any]]:
    command = [
        sys.executable,
        "-m",
        "benchmarks.gpu",
        "--device",
        "cpu",
        "--quick",
        "--parts",
        parts,
        "--out",
        str(out),
    ]
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, **environment})
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("part", FINDINGS)
def test_part_runs_to_its_end_on_a_cpu(part: str, tmp_path: Path, tiny_weights: Path) -> None:
    found = check(part, tmp_path, THIRTYTWO_WEIGHTS=str(tiny_weights))
    assert {each["what"] for each in found} == FINDINGS[part] | {"part"}
    assert [each for each in found if "failure" in each] == []
    assert found[-1]["ended"] == "ok"
    by_name = {each["what"]: each for each in found}
    assert by_name.get("device-side assert", {"ended": True})["ended"] is True
    assert by_name.get("SIGTERM under load", {"lost": 0})["lost"] == 0
    assert by_name.get("same batches", {"bit_for_bit": True})["bit_for_bit"] is True
    assert {each.get("exit_code") for each in found if each["what"] in ("short run", "torchrun", "full run")} <= {0}
    assert (tmp_path / "results.md").read_text().count("\n") == len(found) + 2


def test_every_part_is_in_a_set() -> None:
    assert set(FINDINGS) == set(gpu_check.PARTS) == set(gpu_check.SETS["serve+train"])


@pytest.mark.slow
def test_failed_part_leaves_the_next_one(tmp_path: Path) -> None:
    found = check("references,versions", tmp_path, THIRTYTWO_WEIGHTS=str(tmp_path / "none"))
    ends = {each["part"]: each["ended"] for each in found if each["what"] == "part"}
    assert ends["references"] in ("ok", "exit code 1")
    assert ends["versions"] == "ok"


def test_part_without_time_is_skipped(tmp_path: Path) -> None:
    arguments = gpu_check.parse(["--budget", "1", "--out", str(tmp_path), "--parts", "full"])
    assert [each["ended"] for each in gpu_check.run_all(arguments, arguments.parts)] == ["skipped: no time left"]


def test_unknown_part_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu_check.parse(["--parts", "versions,nothing"])
    assert "unknown nothing" in capsys.readouterr().err


def test_table_has_a_row_for_each_finding(tmp_path: Path) -> None:
    write_table(tmp_path / "x.md", [{"part": "rates", "t": 1.0, "what": "eager", "batch": 8, "note": "a|b"}])
    assert (tmp_path / "x.md").read_text().splitlines()[-1] == "| rates | eager | batch 8, note a/b |"
