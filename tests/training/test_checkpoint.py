import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from app.errors import DataError
from app.model import weights
from tests.support.training import SMALL_FLAGS, full_disk
from training import checkpoint


def test_full_disk_keeps_the_last_checkpoint(tmp_path: Path) -> None:
    file = tmp_path / "checkpoint.pt"
    checkpoint.save(file, {"step": 1})
    with full_disk(50_000), pytest.raises(OSError, match=r"checkpoint\.pt cannot be written: ") as error:
        checkpoint.save(file, {"step": 2, "network": torch.zeros(100_000)})
    assert "\n" not in str(error.value)
    assert checkpoint.load(file) == {"step": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]


@pytest.mark.parametrize("content", [b"", b"no checkpoint", b"PK\3\4 broken"])
def test_broken_checkpoint_is_named(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "checkpoint.pt"
    with pytest.raises(DataError, match="There is no checkpoint at"):
        checkpoint.load(file)
    file.write_bytes(content)
    with pytest.raises(DataError, match=r"checkpoint\.pt is broken; start again without --resume"):
        checkpoint.load(file)


@pytest.mark.slow
def test_kills_at_random_moments_change_nothing(folder: Path, tmp_path: Path) -> None:
    runs = [tmp_path / "whole", tmp_path / "killed"]
    flags = ["--data", str(folder), *SMALL_FLAGS, "--epochs", "20", "--no-test", "--checkpoint-interval-s", "0"]
    command = [sys.executable, "-m", "tests.support.kill_loop", *map(str, runs), *flags]
    process = subprocess.run(command, capture_output=True, text=True, check=False, timeout=280)
    assert process.returncode == 0, process.stderr
    assert process.stdout.count("killed at step") >= 3
    whole, killed = (weights.load(run / "x.safetensors") for run in runs)
    assert all(np.array_equal(whole.state[name], killed.state[name]) for name in whole.state)
    whole_history, killed_history = (checkpoint.load(run / "checkpoint.pt")["history"] for run in runs)
    assert [epoch[0] for epoch in killed_history] == list(range(1, 21))
    assert [epoch[-1] for epoch in killed_history] == [epoch[-1] for epoch in whole_history]
