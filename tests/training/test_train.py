"""`python -m training.train` and `python -m training.evaluate` on a small folder, and the parts of train.py."""

import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from app.errors import DataError
from app.model import networks, weights
from app.model.weights import Weights
from app.settings import Settings
from tests.conftest import serving
from tests.support.training import SMALL_FLAGS, cli_error, fit, full_disk
from training import checkpoint, evaluate, train


@pytest.fixture(scope="module")
def run(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run, with shades.safetensors and run/."""
    tmp = tmp_path_factory.mktemp("trained")
    torch.set_num_threads(1)
    fit(folder, tmp)
    return tmp


@pytest.fixture(scope="module")
def shades(run: Path) -> Weights:
    return weights.load(run / "shades.safetensors")


@pytest.mark.slow
def test_folder_becomes_a_weights_file_and_a_report(run: Path, shades: Weights) -> None:
    card = shades.card
    assert (card.classes, card.dataset) == (["bright", "dim", "middling"], "shades")
    assert card.test_accuracy is not None
    assert card.test_accuracy > 0.9
    assert card.results["test_images"] == 30
    assert "speed" not in card.results
    assert card.recipe["muon_lr"] == 0.05
    epochs = [json.loads(line) for line in (run / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [epoch["epoch"] for epoch in epochs] == list(range(1, 9))
    plots = re.findall(r"!\[\]\((\w+\.png)\)", (run / "run" / "report.md").read_text())
    assert plots == ["learning.png", "confusion.png", "reliability.png", "mistakes.png"]
    assert all((run / "run" / name).read_bytes().startswith(b"\x89PNG") for name in plots)


@pytest.mark.slow
def test_evaluate_reproduces_the_card(
    folder: Path, run: Path, shades: Weights, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "test").symlink_to(folder / "test")  # training images are not needed
    flags = ["--weights", str(run / "shades.safetensors"), "--data", str(tmp_path), "--out", str(tmp_path / "report")]
    evaluate.main(flags)
    results = json.loads((tmp_path / "report" / "evaluation.json").read_text())
    assert results["accuracy"] == pytest.approx(shades.card.test_accuracy, abs=1e-6)
    assert results["robustness"][0]["accuracy"] == results["accuracy"]
    assert set(results["per_class"]) == {"bright", "dim", "middling"}
    for name in ("confusion.png", "reliability.png"):
        assert (tmp_path / "report" / name).read_bytes().startswith(b"\x89PNG")
    assert "| flip and translate TTA (6 views) | " in capsys.readouterr().out
    evaluate.main([*flags, "--no-robustness"])
    assert "robustness" not in json.loads((tmp_path / "report" / "evaluation.json").read_text())


def test_evaluate_rejects_other_classes(folder: Path, tiny_weights: Path) -> None:
    with pytest.raises(SystemExit, match="other classes than the weights"):
        evaluate.main(["--weights", str(tiny_weights), "--data", str(folder)])


@pytest.mark.slow
def test_resume_writes_the_file_that_a_full_disk_prevented(folder: Path, run: Path, tmp_path: Path) -> None:
    shutil.copytree(run / "run", tmp_path / "run")
    with full_disk(4_000):
        code, message = cli_error(folder, tmp_path, "--resume", "--no-test")
    assert (code, "shades.safetensors cannot be written" in message) == (1, True)
    assert not (tmp_path / "shades.safetensors").exists()
    resumed = weights.load(fit(folder, tmp_path, "--resume"))
    assert all(
        np.array_equal(resumed.state[name], value)
        for name, value in weights.load(run / "shades.safetensors").state.items()
    )


@pytest.mark.slow
def test_sigterm_saves_a_checkpoint_and_exits_with_130(folder: Path, tmp_path: Path) -> None:
    flags = ["--data", str(folder), "--out", str(tmp_path / "x.safetensors"), "--run-dir", str(tmp_path / "run")]
    command = [sys.executable, "-m", "training.train", *flags, *SMALL_FLAGS, "--epochs", "10000"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        while "epoch" not in process.stdout.readline():
            assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert "a resumed run continues here" in process.communicate(timeout=60)[0]
    assert process.returncode == 130
    assert checkpoint.load(tmp_path / "run" / "checkpoint.pt")["step"] >= 3


@pytest.mark.slow
def test_two_processes_train_one_network(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "two.safetensors"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=0", "--standalone"]
    flags = ["--data", str(folder), "--out", str(out), "--run-dir", str(tmp_path / "run"), *SMALL_FLAGS]
    process = subprocess.run(
        [*launcher, "-m", "training.train", *flags], capture_output=True, text=True, timeout=280, check=False
    )
    assert process.returncode == 0, process.stderr
    assert process.stdout.count("test accuracy") == 1
    accuracy = weights.load(out).card.test_accuracy
    assert accuracy is not None
    assert accuracy > 0.7  # chance is 0.33
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 8


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["lenet", "mlp"])
def test_article_networks_are_trained_and_served(folder: Path, tmp_path: Path, arch: str) -> None:
    out = tmp_path / f"{arch}.safetensors"
    flags = ["--data", str(folder), "--out", str(out), "--run-dir", str(tmp_path / "run")]
    train.main([*flags, "--arch", arch, "--max-steps", "20"])
    card = weights.load(out).card
    assert (card.architecture, card.recipe["optimizer"]) == (arch, "sgd")
    with serving(Settings(weights=out, max_batch=4)) as client:
        files = [("file", ("x.png", next((folder / "test" / "dim").iterdir()).read_bytes()))]
        assert client.post("/predict", files=files).json()["predictions"][0]["label"] in card.classes


@pytest.mark.slow
def test_fine_tuning_with_an_online_teacher(folder: Path, run: Path, shades: Weights, tmp_path: Path) -> None:
    file = str(run / "shades.safetensors")
    flags = ["--initial-weights", file, "--freeze-bn", "--optimizer", "adam", "--lr", "0.0001", "--epochs", "2"]
    flags += ["--teacher", file, "--online-teacher", "--mixup", "0.5", "--jpeg-prob", "0.5", "--average-checkpoints"]
    card = weights.load(fit(folder, tmp_path, *flags)).card
    assert card.test_accuracy == pytest.approx(shades.card.test_accuracy, abs=0.1)
    name = f"shades {shades.version}"
    assert (card.recipe["initial_weights"], card.recipe["teacher"]) == (name, name)


@pytest.mark.slow
def test_zero_epochs_recalibrate_other_weights(folder: Path, run: Path, shades: Weights, tmp_path: Path) -> None:
    flags = ["--initial-weights", str(run / "shades.safetensors"), "--epochs", "0"]
    found = weights.load(fit(folder, tmp_path, *flags))
    assert found.card.activation_ranges == pytest.approx(shades.card.activation_ranges, rel=1e-2)
    assert all(np.allclose(found.state[name], value, rtol=1e-2, atol=1e-2) for name, value in shades.state.items())
    assert "Learning" not in (tmp_path / "run" / "report.md").read_text()


@pytest.mark.parametrize("classes", [10, 3])
def test_pretrained_parameters_are_copied(tiny_weights: Path, classes: int) -> None:
    images = torch.randint(0, 256, (20, 32, 32, 3), dtype=torch.uint8)
    torch.manual_seed(1)
    network = networks.ConvNet(classes, (8, 8, 8))
    network.initialize(images)
    head = network.head.weight.clone()
    loaded = weights.load(tiny_weights)
    assert train.load_pretrained(network, tiny_weights, images) == f"tiny {loaded.version}"
    stored = torch.from_numpy(loaded.dequantized()["head.weight"])
    assert torch.equal(network.head.weight, stored if classes == 10 else head)


def test_pretrained_network_of_another_shape_is_rejected(tiny_weights: Path) -> None:
    images = torch.zeros(2, 32, 32, 3, dtype=torch.uint8)
    with pytest.raises(DataError, match="it needs --widths 8,8,8 --depth 2"):
        train.load_pretrained(networks.ConvNet(10, (8, 8, 16)), tiny_weights, images)
    with pytest.raises(DataError, match="--initial-weights requires --arch convnet"):
        train.load_pretrained(networks.MLP(10), tiny_weights, images)


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (["--val-fraction", "100"], 2, "error: --val-fraction: input should be less than 1, not '100'."),
        (["--name", "my pets"], 2, "error: Invalid name 'my pets'"),
        (["--device", "tpu"], 1, "DeviceError: tpu is not a device."),
        (["--resume"], 1, "DataError: There is no checkpoint at"),
        (["--out", "/dev/null/x.safetensors"], 1, "/dev/null"),
    ],
)
def test_error_is_one_line_with_an_exit_code(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], code: int, message: str
) -> None:
    found, text = cli_error(folder, tmp_path, *flags)
    text = text or capsys.readouterr().err.splitlines()[-1]
    assert (found, message in text, "\n" in text) == (code, True, False)
    assert not (tmp_path / "run" / "checkpoint.pt").exists()


@pytest.mark.slow
def test_used_name_is_refused_unless_overwritten(
    folder: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(run, tmp_path / "copy")
    assert cli_error(folder, tmp_path / "copy")[0] == 2
    assert "run/checkpoint.pt is of an earlier run" in capsys.readouterr().err
    assert fit(folder, tmp_path / "copy", "--overwrite", "--epochs", "1").exists()
    assert len((tmp_path / "copy" / "run" / "metrics.jsonl").read_text().splitlines()) == 1


@pytest.mark.slow
def test_overwritten_run_cannot_be_resumed(folder: Path, run: Path, tmp_path: Path) -> None:
    shutil.copytree(run / "run", tmp_path / "run")
    flags = ["--data", str(folder), "--out", str(tmp_path / "shades.safetensors"), "--run-dir", str(tmp_path / "run")]
    train.main([*flags, "--overwrite", "--finetune", "head"])
    with pytest.raises(SystemExit, match="There is no checkpoint at"):
        train.main([*flags, "--resume"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("class", "its classes differs: bright, dim, middling, now bright, dim, other."),
        ("fewer", "its number of images differs: 120, now 119."),
        ("content", "its content differs."),
    ],
)
def test_resume_refuses_other_data(folder: Path, run: Path, tmp_path: Path, change: str, message: str) -> None:
    shutil.copytree(run, tmp_path / "copy")
    data = tmp_path / "data"
    shutil.copytree(folder, data)
    if change == "class":
        for split in ("train", "test"):
            (data / split / "middling").rename(data / split / "other")
    elif change == "fewer":
        (data / "train" / "dim" / "0.png").unlink()
    else:
        shutil.copy(data / "train" / "bright" / "0.png", data / "train" / "dim" / "0.png")
    assert cli_error(data, tmp_path / "copy", "--resume", "--epochs", "9")[1].endswith(message)


def test_failed_start_leaves_no_folder(folder: Path, tmp_path: Path) -> None:
    assert cli_error(folder / "missing", tmp_path / "new" / "deep")[0] == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_evaluate_accepts_some_of_the_classes(
    folder: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("dim", "middling"):
        shutil.copytree(folder / "test" / name, tmp_path / "data" / "test" / name)
    (tmp_path / "data" / "test" / "dim" / "notes.txt").write_text("not an image")
    flags = ["--weights", str(run / "shades.safetensors"), "--data", str(tmp_path / "data"), "--no-robustness"]
    evaluate.main([*flags, "--out", str(tmp_path / "report")])
    results = json.loads((tmp_path / "report" / "evaluation.json").read_text())
    assert results["images"] == 20
    assert results["per_class"]["bright"]["support"] == 0
    assert results["balanced_accuracy"] > 0.9
    assert "notes.txt: The first bytes are of none of" in capsys.readouterr().err


def test_full_disk_is_one_line(folder: Path, tmp_path: Path) -> None:
    with full_disk(10_000):
        assert "checkpoint.pt cannot be written" in cli_error(folder, tmp_path)[1]


def test_missing_class_images_are_one_line(folder: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    for name in ("bright", "dim"):
        (data / "train" / name).parent.mkdir(parents=True, exist_ok=True)
        (data / "train" / name).symlink_to(folder / "train" / name)
    (data / "train" / "none").mkdir()
    (data / "train" / "none" / "x.png").write_bytes(b"")
    line = "The train part of data has no readable images for: none. x.png was rejected: The file is empty."
    assert cli_error(data, tmp_path, "--no-test")[1].endswith(line)
