from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from app import engines
from app.engines import CascadeEngine
from app.errors import DataError
from app.model import weights
from app.model.weights import Weights
from tests.support.training import fit, shades
from training import cascade


@pytest.fixture(scope="module")
def networks(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A small and a larger network, trained on the same images."""
    paths = [tmp_path_factory.mktemp(name) for name in ("small", "large")]
    return [fit(folder, path, "--widths", widths) for path, widths in zip(paths, ("4,4,4", "12,12,12"), strict=True)]


def compose(networks: list[Path], folder: Path, out: Path, *flags: str) -> Weights:
    files = [str(path) for path in networks]
    cascade.main([*files, "--data", str(folder), "--out", str(out), *flags])
    return weights.load(out)


@pytest.mark.slow
def test_cascade_is_composed_verified_and_evaluated(networks: list[Path], folder: Path, tmp_path: Path) -> None:
    stages = ["--stage", "0", "--stage", "1", "--stage", "1:flip:2"]
    loaded = compose(networks, folder, tmp_path / "cascade.safetensors", *stages)
    card = loaded.card
    assert [(stage.network, stage.hflip, stage.average_last) for stage in card.stages] == [
        (0, False, 1),
        (1, False, 1),
        (1, True, 2),
    ]
    assert card.stages[0].share == 1.0
    assert card.parameters == sum(network.parameters for network in card.networks)
    assert card.results["test_stage_shares"][0] == 1.0
    assert len(card.results["test_jpeg80_stage_accuracies"]) == 3
    assert card.forward_gflops == card.results["test_gflops"]
    engine = engines.load(loaded)
    assert isinstance(engine, CascadeEngine)
    assert np.isfinite(engine(loaded.reference_images).probabilities).all()


def test_used_name_is_refused_before_the_files_are_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "c.safetensors"
    out.touch()
    for flags, error in (([], f"--out: {out} is of an earlier run"), (["--name", "a b"], "Invalid name 'a b'")):
        with pytest.raises(SystemExit) as exit_info:
            compose([tmp_path / "none"], tmp_path / "none", out, "--stage", "0", *flags)
        assert exit_info.value.code == 2
        assert error in capsys.readouterr().err


@pytest.mark.slow
def test_test_images_can_be_left_unread(networks: list[Path], folder: Path, tmp_path: Path) -> None:
    card = compose(networks, folder, tmp_path / "c.safetensors", "--stage", "0", "--stage", "1", "--no-test").card
    assert card.test_accuracy is None
    assert not any(name.startswith("test") for name in card.results)
    assert "val_stage_shares" in card.results


@pytest.mark.slow
def test_network_of_the_first_stage_has_the_ood_score(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    for label, images in zip(("a", "b", "c"), shades(240, 16).images.reshape(80, 3, 16, 16, 3).unbind(1), strict=True):
        (folder / "train" / label).mkdir(parents=True)
        for i, image in enumerate(images):
            Image.fromarray(image.numpy()).save(folder / "train" / label / f"{i}.png")
    flags = "--val-fraction", "0.5", "--epochs", "1", "--no-test"
    networks = [fit(folder, tmp_path / widths, "--widths", widths, *flags) for widths in ("8,8,8", "4,4,4")]
    loaded = compose(networks, folder, tmp_path / "c.safetensors", "--stage", "1", "--stage", "0", "--no-test")
    assert [network.card.ood is None for network in loaded.networks] == [True, False]
    assert loaded.card.has_ood_score
    assert engines.load(loaded)(loaded.reference_images).ood is not None


@pytest.mark.slow
def test_networks_with_other_held_out_images_are_refused(networks: list[Path], folder: Path, tmp_path: Path) -> None:
    other = fit(folder, tmp_path, "--widths", "4,4,4", "--epochs", "1", "--val-fraction", "0.3")
    with pytest.raises(SystemExit, match=r"--val-fraction 0\.2 --seed 0 and --val-fraction 0\.3 --seed 0"):
        compose([other, networks[1]], folder, tmp_path / "c.safetensors", "--stage", "0", "--stage", "1")


@pytest.mark.slow
@pytest.mark.parametrize("stages", [("0", "2"), ("0:2", "1"), ("0", "1:3")])
def test_stage_of_a_missing_file_or_stage_is_refused(
    networks: list[Path], folder: Path, tmp_path: Path, stages: tuple[str, str]
) -> None:
    flags = [flag for stage in stages for flag in ("--stage", stage)]
    with pytest.raises(SystemExit, match="none of the 2 files"):
        compose(networks, folder, tmp_path / "c.safetensors", *flags)


@pytest.mark.slow
def test_file_that_no_stage_names_is_refused(networks: list[Path], folder: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=f"No --stage names {networks[1]}, file 1"):
        compose(networks, folder, tmp_path / "c.safetensors", "--stage", "0")


@pytest.mark.slow
def test_cascade_of_very_small_networks_is_loaded(folder: Path, tmp_path: Path) -> None:
    files = [
        fit(folder, tmp_path / name, "--arch", "mlp", "--max-steps", "5", "--val-fraction", "0.2") for name in "ab"
    ]
    loaded = compose(files, folder, tmp_path / "c.safetensors", "--stage", "0", "--stage", "1")
    assert 0 < (loaded.card.forward_gflops or 0) < 1e-3


def test_data_of_other_classes_are_refused(
    tiny_weights: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny, file = weights.load(tiny_weights), tmp_path / "tiny.safetensors"
    card = tiny.card.model_copy(update={"recipe": {"val_fraction": 0.1, "seed": 0}})
    weights.save(file, card, tiny.state, tiny.reference_images, tiny.reference_probabilities)
    with pytest.raises(SystemExit, match="train lacks classes of the networks: airplane, automobile"):
        compose([file], folder / "train", tmp_path / "c.safetensors", "--stage", "0")
    printed = capsys.readouterr().err
    assert "dim/notes.txt: The first bytes are of none of" in printed
    assert "pictures are held out for the test" in printed


@pytest.mark.parametrize(
    ("recipe", "reason"),
    [
        ({"finetune": "head", "val_fraction": 0.1, "seed": 0}, "a linear head"),
        ({"dp_epsilon": 8.0, "steps": 30}, "a head of --dp-epsilon"),
        ({"stages": [], "max_loss": 0.1, "runs": []}, "lacks --val-fraction and --seed"),
    ],
)
def test_file_trained_on_validation_images_is_refused(
    recipe: dict[str, object], reason: str, tiny_weights: Path, tmp_path: Path
) -> None:
    tiny, file = weights.load(tiny_weights), tmp_path / "head.safetensors"
    card = tiny.card.model_copy(update={"recipe": recipe})
    weights.save(file, card, tiny.state, tiny.reference_images, tiny.reference_probabilities)
    with pytest.raises(SystemExit, match=f"DataError: {file} is .*{reason}"):
        compose([file], tmp_path / "none", tmp_path / "c.safetensors", "--stage", "0")


def test_cascade_of_a_cascade_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="is a cascade; name the files of its networks"):
        compose([weights.BUNDLED], tmp_path / "none", tmp_path / "c.safetensors", "--stage", "0")


@pytest.mark.parametrize("content", ["[{]", "{}", "[1]"])
def test_broken_list_of_runs_is_one_line(content: str, tmp_path: Path) -> None:
    runs = tmp_path / "runs.json"
    runs.write_text(content)
    with pytest.raises(SystemExit, match=f"DataError: --runs: {runs} is no JSON"):
        compose([tmp_path], tmp_path, tmp_path / "c.safetensors", "--stage", "0", "--runs", str(runs))


@pytest.mark.parametrize("flags", [("--split-seed", "-1"), ("--split-seed", str(1 << 64)), ("--test-fraction", "2")])
def test_unusable_split_is_one_line(flags: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cascade.parse(["x", "--data", "x", "--out", "x", "--stage", "0", "=".join(flags)])
    assert capsys.readouterr().err.startswith(f"error: argument {flags[0]}: {flags[1]} is not from 0 to ")


def test_networks_of_other_classes_are_refused(tiny_weights: Path) -> None:
    tiny = weights.load(tiny_weights)
    other = tiny._replace(card=tiny.card.model_copy(update={"classes": list("abcdefghij")}))
    with pytest.raises(DataError, match="same classes"):
        cascade.compose([tiny, other], [], "x", cascade.Split(torch.empty(0), torch.empty(0)))


@pytest.mark.parametrize(
    ("text", "expected"),
    [("0", (0, False, 1)), ("2:flip", (2, True, 1)), ("1:3", (1, False, 3)), ("1:flip:2", (1, True, 2))],
)
def test_stage_flags_are_parsed(text: str, expected: tuple[int, bool, int]) -> None:
    stage = cascade.parse_stage(text)
    assert (stage.network, stage.hflip, stage.average_last) == expected
