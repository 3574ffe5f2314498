"""How a run ends when it cannot go on, and what it leaves: always a checkpoint that is whole."""

import json
import pty
import re
import resource
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, redirect_stderr, suppress
from pathlib import Path

import numpy as np
import pytest
import torch

from app.model import weights
from tests.training.test_train import SMALL
from training import checkpoint, train
from training.data import Split
from training.distributed import Ranks
from training.loader import Batches
from training.recipe import Recipe
from training.trainer import Diverged, Trainer

# In one process, since importing takes longest: a run that is left alone, then one that dies at random moments, each
# after a checkpoint of its own, until at last it may come to its end. The clock counts the process's own time, so that
# a busy machine makes no difference; its signal ends the process wherever it is, as SIGKILL does.
KILLER = """
import os, random, signal, sys, threading, time
from pathlib import Path
from training import checkpoint, train

def doom(file, delay):
    before = file.stat().st_mtime_ns if file.exists() else 0
    while not file.exists() or file.stat().st_mtime_ns == before:
        time.sleep(0.001)
    signal.setitimer(signal.ITIMER_PROF, delay)

def start(folder, delay=0):
    file = Path(folder, "checkpoint.pt")
    child = os.fork()
    if not child:
        if delay:
            threading.Thread(target=doom, args=(file, delay), daemon=True).start()
        more = ["--resume"] if file.exists() else []
        train.main(["--out", f"{folder}/x.safetensors", "--run-dir", folder, *sys.argv[3:], *more])
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

whole, cut = sys.argv[1:3]
assert start(whole) == 0
chance = random.Random(0)
for _ in range(6):
    ended = start(cut, chance.uniform(0.001, 0.08))
    assert ended in (0, -signal.SIGPROF), ended
    print("killed" if ended else "came through", "at step", checkpoint.load(Path(cut, "checkpoint.pt"))["step"])
assert start(cut) == 0
"""


def flags(folder: Path, tmp: Path, *more: str) -> list[str]:
    return ["--data", str(folder), "--out", str(tmp / "x.safetensors"), "--run-dir", str(tmp), *SMALL, *more]


def ending(arguments: list[str]) -> str:
    with pytest.raises(SystemExit) as ended:
        train.main(arguments)
    sentence = str(ended.value)
    assert "\n" not in sentence
    return sentence


@contextmanager
def full_disk(limit: int) -> Iterator[None]:
    """No file grows beyond so many bytes; the error has another number than that of a full disk, and no other way."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture(scope="module")
def finished(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The flags of a run that came to its end."""
    done = flags(folder, tmp_path_factory.mktemp("run"), "--epochs", "2", "--skip-test", "--checkpoint-s", "0")
    train.main(done)
    return done


@pytest.mark.timeout(300)
def test_kills_at_random_moments_change_nothing(folder: Path, tmp_path: Path) -> None:
    runs = [tmp_path / "whole", tmp_path / "cut"]
    more = ["--data", str(folder), *SMALL, "--epochs", "20", "--skip-test", "--checkpoint-s", "0"]
    ended = subprocess.run(
        [sys.executable, "-c", KILLER, *map(str, runs), *more], capture_output=True, text=True, check=False, timeout=280
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("killed at step") >= 3
    whole, cut = (weights.load(run / "x.safetensors") for run in runs)
    assert all(np.array_equal(whole.state[name], cut.state[name]) for name in whole.state)
    whole_epochs, cut_epochs = (
        [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in runs
    )
    assert [epoch["epoch"] for epoch in cut_epochs] == list(range(1, 21))
    assert [e["holdout_accuracy"] for e in cut_epochs] == [e["holdout_accuracy"] for e in whole_epochs]


def test_a_full_disk_keeps_the_last_checkpoint(tmp_path: Path) -> None:
    file = tmp_path / "checkpoint.pt"
    checkpoint.save(file, {"step": 1})
    with full_disk(50_000), pytest.raises(OSError, match=r"checkpoint\.pt cannot be written: ") as failed:
        checkpoint.save(file, {"step": 2, "network": torch.zeros(100_000)})
    assert "\n" not in str(failed.value)
    assert checkpoint.load(file) == {"step": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_a_full_disk_ends_training_in_one_sentence(folder: Path, tmp_path: Path) -> None:
    with full_disk(10_000):
        assert "checkpoint.pt cannot be written" in ending(flags(folder, tmp_path))


def test_a_weights_file_that_found_no_room_is_written_by_resuming(finished: list[str]) -> None:
    out = Path(finished[3])
    out.unlink()
    with full_disk(4_000):
        assert "x.safetensors cannot be written" in ending([*finished, "--resume"])
    assert not out.exists()
    train.main([*finished, "--resume"])
    assert weights.load(out).card.name == "x"


def test_a_run_that_diverges_keeps_the_last_checkpoint(finished: list[str], tmp_path: Path) -> None:
    before = (Path(finished[5]) / "checkpoint.pt").read_bytes()
    file = tmp_path / "checkpoint.pt"
    file.write_bytes(before)
    more = ["--run-dir", str(tmp_path), "--resume", "--epochs", "5", "--filter-lr", "nan"]
    assert "lower learning rate" in ending([*finished, *more])
    assert file.read_bytes() == before


@pytest.fixture
def trainer() -> Trainer:
    """Of 60 steps an epoch."""
    split = Split(torch.zeros(120, 32, 32, 3, dtype=torch.uint8), torch.arange(120) % 2)
    recipe = Recipe(widths=(8, 8, 8), batch_size=2, jpeg=0)
    return Trainer(train.prepare(recipe, split, 2), recipe, Batches(split, recipe), torch.device("cpu"), Ranks())


def test_a_network_that_is_no_number_is_not_saved(trainer: Trainer) -> None:
    assert trainer.state()["step"] == 0
    next(trainer.network.parameters()).data.fill_(float("inf"))
    with pytest.raises(Diverged, match="no number any more at step 0"):
        trainer.state()


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--name", "my pets"], "SettingsError: The card's name cannot be 'my pets'"),
        (["--arch", "lenet", "--image-size", "48"], "SettingsError: --image-size must be 32 for lenet."),
        (["--out", "/dev/null/x.safetensors"], "/dev/null"),
    ],
)
def test_what_cannot_end_well_does_not_begin(folder: Path, tmp_path: Path, more: list[str], sentence: str) -> None:
    assert sentence in ending(flags(folder, tmp_path, *more))
    assert not (tmp_path / "checkpoint.pt").exists()


def test_a_class_without_pictures_is_named(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "data" / "test").mkdir(parents=True)
    (tmp_path / "data" / "train").mkdir()
    for label in ("bright", "dim"):
        (tmp_path / "data" / "train" / label).symlink_to(folder / "train" / label)
    (tmp_path / "data" / "train" / "none").mkdir()
    assert ending(flags(tmp_path / "data", tmp_path)).endswith("train has no pictures for: none.")


def test_a_terminal_shows_the_way_to_go(trainer: Trainer) -> None:
    terminal, end = pty.openpty()
    termios.tcsetwinsize(end, (24, 160))
    with ThreadPoolExecutor(1) as pool:
        shown = pool.submit(read_to_the_end, terminal)
        with open(end, "w") as errors, redirect_stderr(errors):
            trainer.run_epoch(lambda: time.sleep(0.01))
    clocks, figures = r"\[\d\d:\d\d<\d\d:\d\d, .*batch/s", r"\d+ images/s, loss \d\.\d{3}, accuracy [\d.]+%"
    assert re.search(rf"epoch 1: +\d+%\|.*\| \d+/60 {clocks}, {figures}", shown.result())


def read_to_the_end(terminal: int) -> str:
    shown = b""
    with open(terminal, "rb", buffering=0) as stream, suppress(OSError):  # its end is told by an error
        while part := stream.read(4096):
            shown += part
    return shown.decode()


def test_tensorboard_gets_every_epoch_once(folder: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for more in ([], ["--resume"]):
        train.main(flags(folder, tmp_path, "--epochs", "3", "--skip-test", "--tensorboard", *more))
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    epochs = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    for name in ("loss", "train_accuracy", "holdout_accuracy", "images_per_s"):
        points = [(point.step, point.value) for point in events.Scalars(name)]
        assert points == [(epoch["epoch"], pytest.approx(epoch[name], rel=1e-5)) for epoch in epochs]
    assert len(epochs) == 3
