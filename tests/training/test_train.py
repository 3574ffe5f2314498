"""Training as a user runs it, on a small folder."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from app.model import weights
from app.settings import Settings
from benchmarks import pareto
from tests.conftest import serving
from training import checkpoint, evaluate, train

SMALL = ["--widths", "8,8,8", "--depth", "2", "--translate", "2", "--epochs", "8", "--batch-size", "30"]
SMALL += ["--holdout", "0.2", "--filter-lr", "0.05"]


def fit(folder: Path, tmp: Path, *flags: str) -> Path:
    out = tmp / "shades.safetensors"
    train.main(["--data", str(folder), "--out", str(out), "--run-dir", str(tmp / "run"), *SMALL, *flags])
    return out


@pytest.fixture(scope="module")
def shades(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A weights file that knows the folder's classes."""
    return fit(folder, tmp_path_factory.mktemp("shades"))


def test_a_folder_becomes_a_weights_file_that_knows_its_classes(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loaded = weights.load(fit(folder, tmp_path))
    assert loaded.card.classes == ["bright", "dim", "middling"]
    assert loaded.card.test_accuracy > 0.9
    assert loaded.card.dataset == "shades"
    assert loaded.card.results["test_images"] == 30
    # 12 numbers for 24 filters on 31 x 31 places, then per group 3 x 3 x channels in for 8 filters, twice for 2 groups
    macs = 31**2 * 24 * 12 + 31**2 * 216 * 8 + 15**2 * 72 * 8 + (15**2 + 7**2) * 72 * 8 + (7**2 + 3**2) * 72 * 8 + 24
    assert loaded.card.forward_gflops == pytest.approx(2e-9 * macs, rel=1e-3)
    assert loaded.reference_images.shape == (3, 32, 32, 3)
    filters = loaded.state["groups.1.convs.1.weight"], loaded.state["whiten.weight"]
    assert [tensor.dtype for tensor in filters] == [np.int8, np.float16]
    assert set(loaded.card.results["speed"]["images_per_s"]) == {"1", "8", "32", "128"}
    epochs = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [epoch["epoch"] for epoch in epochs] == list(range(1, 9))
    assert "1 files were left out" in capsys.readouterr().out
    report = (tmp_path / "run" / "report.md").read_text()
    pictures = re.findall(r"!\[\]\((\w+\.png)\)", report)
    assert pictures == ["learning.png", "confusion.png", "reliability.png", "mistakes.png"]
    assert all((tmp_path / "run" / name).read_bytes().startswith(b"\x89PNG") for name in pictures)


def test_a_seed_repeats_a_run(folder: Path, tmp_path: Path) -> None:
    first, second = (weights.load(fit(folder, tmp_path / name, "--epochs", "2")) for name in "ab")
    assert all(np.array_equal(first.state[name], second.state[name]) for name in first.state)


def test_a_killed_run_resumes_to_the_same_weights(folder: Path, tmp_path: Path) -> None:
    everything = ["--epochs", "30"]
    whole = weights.load(fit(folder, tmp_path / "whole", *everything, "--checkpoint-s", "0"))
    flags = ["--data", str(folder), "--out", str(tmp_path / "cut.safetensors"), "--run-dir", str(tmp_path / "cut")]
    flags += [*SMALL, *everything, "--checkpoint-s", "0"]
    for number in (signal.SIGKILL, signal.SIGTERM):
        checkpoint = tmp_path / "cut" / "checkpoint.pt"
        resume = ["--resume"] if checkpoint.exists() else []
        before = checkpoint.stat().st_mtime_ns if resume else 0
        running = subprocess.Popen(
            [sys.executable, "-m", "training.train", *flags, *resume],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
        )
        while running.poll() is None and not (checkpoint.exists() and checkpoint.stat().st_mtime_ns > before):
            time.sleep(0.005)
        running.send_signal(number)
        out = running.communicate(timeout=60)[0]
        if number == signal.SIGTERM:
            assert running.returncode == 130
            assert "--resume goes on from here" in out
    train.main([*flags, "--resume"])
    resumed = weights.load(tmp_path / "cut.safetensors")
    assert all(np.array_equal(whole.state[name], resumed.state[name]) for name in whole.state)


def test_a_finished_run_goes_on_for_longer_at_rates_that_fall_again(folder: Path, tmp_path: Path) -> None:
    fit(folder, tmp_path, "--epochs", "2")
    card = weights.load(fit(folder, tmp_path, "--resume", "--epochs", "4", "--cutout", "2")).card
    assert (card.recipe["epochs"], card.recipe["cutout"]) == (4, 2)
    state = checkpoint.load(tmp_path / "run" / "checkpoint.pt")
    assert state["step"] == state["optimizers"][1]["param_groups"][0]["end"] == 4 * 3
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [1, 2, 3, 4]


def test_a_run_that_went_on_averages_its_ends(folder: Path, tmp_path: Path) -> None:
    fit(folder, tmp_path, "--epochs", "2")
    first = checkpoint.load(tmp_path / "run" / "checkpoint.pt")["network"]["head.weight"]
    for epochs in ("4", "4"):  # a finished run that is resumed as it is writes the same file again
        loaded = weights.load(fit(folder, tmp_path, "--resume", "--epochs", epochs, "--average"))
        state = checkpoint.load(tmp_path / "run" / "checkpoint.pt")
        assert len(state["ends"]) == 1
        mean = (first + state["network"]["head.weight"]) / 2
        assert np.array_equal(loaded.state["head.weight"], mean.half().numpy())


def test_a_resumed_run_keeps_its_network(folder: Path, tmp_path: Path) -> None:
    fit(folder, tmp_path, "--epochs", "1")
    with pytest.raises(SystemExit, match="A resumed run keeps its network"):
        fit(folder, tmp_path, "--resume", "--widths", "8,8,16")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--holdout", "100"], "--holdout must be a share between 0 and 1"),
        (["--cutout", "40"], "--cutout must be from 0 to the image size"),
        (["--widths", "8,0"], "--widths must be positive numbers"),
        (["--head-lr", "0"], "--head-lr must be above 0"),
        (["--resume"], "There is no checkpoint at"),
        (["--filter-lr", "nan"], "The loss is nan at step 1"),
    ],
)
def test_what_goes_wrong_is_one_sentence(folder: Path, tmp_path: Path, flags: list[str], message: str) -> None:
    with pytest.raises(SystemExit) as ended:
        fit(folder, tmp_path, *flags)
    assert message in str(ended.value)
    assert "\n" not in str(ended.value)


def test_a_missing_folder_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"DataError: .*neither cifar-10-batches-py"):
        train.main(["--data", str(tmp_path / "none"), "--run-dir", str(tmp_path / "run")])


def test_evaluate_reproduces_the_card(
    folder: Path, tmp_path: Path, shades: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate.main(["--weights", str(shades), "--data", str(folder), "--out", str(tmp_path / "report"), "--speed"])
    figures = json.loads((tmp_path / "report" / "evaluation.json").read_text())
    assert figures["accuracy"] == pytest.approx(weights.load(shades).card.test_accuracy, abs=1e-6)
    assert len(figures["readings"]) == 9
    assert figures["readings"][0]["accuracy"] == figures["accuracy"]
    assert set(figures["speed"]["images_per_s"]) == {"1", "8", "32", "128"}
    assert set(figures["per_class"]) == {"bright", "dim", "middling"}
    for name in ("confusion.png", "reliability.png"):
        assert (tmp_path / "report" / name).read_bytes().startswith(b"\x89PNG")
    out = capsys.readouterr().out
    assert "| six views: and moved by a pixel | " in out
    assert "| batch | images/s |" in out


def test_evaluate_can_be_quick_and_needs_no_training_pictures(folder: Path, tmp_path: Path, shades: Path) -> None:
    (tmp_path / "test").symlink_to(folder / "test")
    evaluate.main(["--weights", str(shades), "--data", str(tmp_path), "--out", str(tmp_path / "report"), "--quick"])
    figures = json.loads((tmp_path / "report" / "evaluation.json").read_text())
    assert figures["accuracy"] > 0.9
    assert "readings" not in figures


def test_the_test_images_can_be_left_unread(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    card = weights.load(fit(folder, tmp_path, "--skip-test")).card
    assert card.test_accuracy is None
    assert "test_images" not in card.results
    assert "held-out accuracy" in capsys.readouterr().out


def test_evaluate_refuses_other_classes(folder: Path, tmp_path: Path, tiny_weights: Path) -> None:
    with pytest.raises(SystemExit, match="other classes than the weights"):
        evaluate.main(["--weights", str(tiny_weights), "--data", str(folder)])


def test_a_student_learns_from_a_teachers_answers_alone(folder: Path, tmp_path: Path, shades: Path) -> None:
    """With the labels given no share of the loss, what it knows came from the teacher."""
    flags = ["--teacher", str(shades), "--teacher-share", "1", "--widths", "8,8,8"]
    card = weights.load(fit(folder, tmp_path / "student", *flags)).card
    assert card.test_accuracy is not None
    assert card.test_accuracy > 0.9
    assert card.recipe["teacher"] == f"shades {weights.load(shades).version}"


def test_a_teacher_can_answer_blends_while_normalisation_stays(folder: Path, tmp_path: Path, shades: Path) -> None:
    """From a network that knows little yet, by small steps, towards one that knows the folder."""
    begun = fit(folder, tmp_path / "begun", "--epochs", "1", "--filter-lr", "0.002")
    flags = ["--initial-weights", str(begun), "--freeze-norms", "--optimizer", "adam", "--lr", "0.003"]
    flags += ["--teacher", str(shades), "--teacher-anew", "--teacher-soften", "1", "--teacher-share", "1"]
    found = weights.load(
        fit(folder, tmp_path, *flags, "--blend", "0.5", "--jpeg", "0.5", "--average", "--epochs", "12")
    )
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < losses[0]
    assert found.card.recipe["teacher"] == f"shades {weights.load(shades).version}"
    state = checkpoint.load(tmp_path / "run" / "checkpoint.pt")
    (start,) = state["ends"]
    kept = [name for name in start if name.endswith(("running_mean", "running_var"))]
    assert kept
    assert all(torch.equal(start[name], state["network"][name]) for name in kept)


@pytest.mark.parametrize(
    ("flag", "needed"),
    [("--freeze-norms", "--initial-weights"), ("--teacher-anew", "--teacher"), ("--blend=0.5", "--teacher-anew")],
)
def test_what_needs_another_flag_says_so(folder: Path, tmp_path: Path, flag: str, needed: str) -> None:
    with pytest.raises(SystemExit, match=f"{flag.split('=')[0]} must be given with {needed} only"):
        fit(folder, tmp_path, flag)


GENTLE = ["--filter-lr", "1e-6", "--bias-lr", "1e-6", "--head-lr", "1e-6", "--epochs", "1"]


def test_a_run_can_begin_with_another_files_network(folder: Path, tmp_path: Path, shades: Path) -> None:
    """Steps too small to learn by leave it as good as it was; averaged, its end counts as much as its beginning."""
    card = weights.load(fit(folder, tmp_path, "--initial-weights", str(shades), "--average", *GENTLE)).card
    assert card.test_accuracy == pytest.approx(weights.load(shades).card.test_accuracy, abs=0.05)
    assert card.recipe["initial_weights"] == f"shades {weights.load(shades).version}"
    (begun,) = checkpoint.load(tmp_path / "run" / "checkpoint.pt")["ends"]
    assert np.allclose(begun["head.weight"].numpy(), weights.load(shades).state["head.weight"])


def test_no_pass_at_all_calibrates_another_files_network(folder: Path, tmp_path: Path, shades: Path) -> None:
    begun = weights.load(shades)
    found = weights.load(fit(folder, tmp_path, "--initial-weights", str(shades), "--epochs", "0"))
    assert found.card.activation_ranges == pytest.approx(begun.card.activation_ranges, rel=1e-3)
    assert found.card.temperature == pytest.approx(begun.card.temperature, rel=1e-2)
    assert all(np.allclose(found.state[name], value, rtol=1e-3, atol=1e-3) for name, value in begun.state.items())
    assert "Learning" not in (tmp_path / "run" / "report.md").read_text()
    with pytest.raises(SystemExit, match="--epochs must be above 0, or 0 with --initial-weights"):
        fit(folder, tmp_path, "--epochs", "0")


def test_filters_serve_other_classes_too(folder: Path, tmp_path: Path, shades: Path) -> None:
    other = tmp_path / "other"
    for part in ("train", "test"):
        for label in ("bright", "dim"):
            shutil.copytree(folder / part / label, other / part / label)
    card = weights.load(fit(other, tmp_path, "--initial-weights", str(shades))).card
    assert card.classes == ["bright", "dim"]
    assert card.test_accuracy > 0.9


def test_a_network_of_another_shape_cannot_be_begun_with(folder: Path, tmp_path: Path, shades: Path) -> None:
    with pytest.raises(SystemExit, match=r"it asks for --widths 8,8,8 --depth 2"):
        fit(folder, tmp_path, "--initial-weights", str(shades), "--widths", "8,8,16")
    with pytest.raises(SystemExit, match="Only a convnet can begin"):
        fit(folder, tmp_path, "--initial-weights", str(shades), "--arch", "mlp")


def test_a_teacher_of_other_classes_is_refused(folder: Path, tmp_path: Path, tiny_weights: Path) -> None:
    with pytest.raises(SystemExit, match="has other classes"):
        fit(folder, tmp_path, "--teacher", str(tiny_weights))


@pytest.mark.parametrize("arch", ["lenet", "mlp"])
def test_the_articles_networks_train_by_one_flag_and_are_served(folder: Path, tmp_path: Path, arch: str) -> None:
    out = tmp_path / f"{arch}.safetensors"
    train.main(
        ["--data", str(folder), "--out", str(out), "--run-dir", str(tmp_path / "run"), "--arch", arch, "--steps", "20"]
    )
    loaded = weights.load(out)
    assert loaded.card.architecture == arch
    assert loaded.card.recipe["optimizer"] == "sgd"
    with serving(Settings(weights=out, max_batch=4)) as client:
        files = [("file", ("x.png", next((folder / "test" / "dim").iterdir()).read_bytes()))]
        assert client.post("/predict", files=files).json()["predictions"][0]["label"] in loaded.card.classes


def test_two_processes_train_one_network(folder: Path, tmp_path: Path) -> None:
    """Both see a half of every batch, and end with one set of weights as good as one process's."""
    out = tmp_path / "two.safetensors"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=0", "--standalone"]
    flags = ["--data", str(folder), "--out", str(out), "--run-dir", str(tmp_path / "run"), *SMALL]
    ended = subprocess.run(
        [*launcher, "-m", "training.train", *flags], capture_output=True, text=True, timeout=110, check=False
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("test accuracy") == 1
    assert weights.load(out).card.test_accuracy > 0.9
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 8


def test_weights_files_are_compared_in_the_order_of_their_cost(
    folder: Path, tmp_path: Path, shades: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    larger = fit(folder, tmp_path, "--widths", "16,16,16", "--epochs", "1", "--name", "larger", "--skip-test")
    capsys.readouterr()
    pareto.main([str(larger), str(shades), "--out", str(tmp_path / "frontier.png")])
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[0] for row in rows] == ["| shades", "| larger"]
    assert float(rows[0][1]) < float(rows[1][1])
    assert (tmp_path / "frontier.png").read_bytes().startswith(b"\x89PNG")
