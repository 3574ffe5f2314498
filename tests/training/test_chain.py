import contextlib
import re
import shutil
from pathlib import Path

import pytest
import torch

from app.errors import SettingsError
from app.model import weights
from training import chain, checkpoint, cli, data, provenance

RUN = """
[defaults]
depth = 2
epochs = 6
batch_size = 30
val_fraction = 0.2
muon_lr = 0.05
image_size = 16
random_crop_padding = 2
cutout = 4

[[networks]]
name = "large"
[[networks.runs]]
widths = [12, 12, 12]
[[networks.runs]]
epochs = 8
average_checkpoints = true

[[networks]]
name = "small"
[[networks.runs]]
widths = [8, 8, 8]
teacher = "large/2"
jpeg_prob = 0.5
jpeg_quality = [60, 90]

[cascade]
stages = ["small", "large", "large:flip:2"]
max_loss = 0.01
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text(RUN)
    return path


def run(recipe: Path, folder: Path, out: Path, *flags: str) -> None:
    chain.main([str(recipe), "--data", str(folder), "--out", str(out), "--run-dir", str(out.parent / "runs"), *flags])


def commands(printed: str) -> list[str]:
    return re.findall(r"^\$ python -m training\.(\w+)", printed, re.MULTILINE)


@pytest.mark.slow
def test_chain_makes_a_cascade_and_resumes(
    recipe: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "shades.safetensors"
    run(recipe, folder, out)
    assert commands(capsys.readouterr().out) == ["train", "train", "train", "cascade"]
    first = weights.load(out)
    card = first.card
    assert [(stage.network, stage.hflip) for stage in card.stages] == [(1, False), (0, False), (0, True)]
    assert card.recipe["max_loss"] == 0.01
    assert [(each["network"], each["run"]) for each in card.recipe["runs"]] == [
        ("large", 1),
        ("large", 2),
        ("small", 1),
    ]
    assert card.recipe["runs"][2]["flags"]["teacher"] == f"large {card.recipe['runs'][1]['version']}"
    assert all(each["machine"] for each in card.recipe["runs"])
    total = [weights.load(tmp_path / "runs/large" / f"{n}.safetensors").card.results["training_s"] for n in (1, 2)]
    assert [each["training_s"] for each in card.recipe["runs"][:2]] == [total[0], total[1] - total[0]]
    assert card.results["machine"]
    assert card.test_accuracy is not None
    assert not any(name.startswith("test") for network in card.networks for name in network.results)
    run(recipe, folder, out)
    assert capsys.readouterr().out.startswith(f"{out} is finished; --overwrite composes it again")
    run(recipe, folder, out, "--overwrite")
    assert commands(capsys.readouterr().out) == ["cascade"]
    recipe.write_text(RUN.replace("max_loss = 0.01", "max_loss = 0.02"))
    with pytest.raises(SystemExit):
        run(recipe, folder, out)
    assert f"--out: {out} is of an earlier run" in capsys.readouterr().err
    out.unlink()
    (tmp_path / "runs/small/1.safetensors").unlink()  # as if the last run was interrupted
    run(recipe, folder, out, "--no-test")
    assert commands(capsys.readouterr().out) == ["train", "cascade"]
    assert weights.load(out).card.networks[1].results["val_accuracy"] == card.networks[1].results["val_accuracy"]


@pytest.mark.slow
def test_no_network_sees_the_test_images_of_a_flat_folder(recipe: Path, folder: Path, tmp_path: Path) -> None:
    recipe.write_text(RUN.replace("epochs = 6", "epochs = 1").replace("epochs = 8", "epochs = 2"))
    out, flat = tmp_path / "shades.safetensors", folder / "train"
    run(recipe, flat, out)
    dataset = data.load(flat, 16)
    card = weights.load(out).card
    assert card.results["test_images"] == len(dataset.test) == 24
    for network, recorded in zip(("large", "small"), card.networks, strict=True):
        state = checkpoint.load(tmp_path / "runs" / network / "checkpoint.pt")
        assert state["fingerprint"] == data.fingerprint(dataset)  # of training and validation images together
        assert (recorded.recipe["test_fraction"], recorded.recipe["split_seed"]) == (0.2, 0)
    out.unlink()
    changed = tmp_path / "changed"
    shutil.copytree(flat, changed)
    (changed / "dim" / "0.png").write_bytes((changed / "bright" / "0.png").read_bytes())
    with pytest.raises(SystemExit, match=rf"runs in {tmp_path}/runs/large continue on the same .* its content differs"):
        run(recipe, changed, out)
    with pytest.raises(SystemExit, match=r"its number of images differs: 96, now 120"):
        run(recipe, flat, out, "--no-test")
    trained_on = {image.numpy().tobytes() for image in dataset.train.images}
    assert trained_on.isdisjoint(image.numpy().tobytes() for image in dataset.test.images)


@pytest.mark.slow
def test_network_that_no_stage_names_is_a_teacher_only(recipe: Path, folder: Path, tmp_path: Path) -> None:
    stages = 'stages = ["small", "large", "large:flip:2"]'
    recipe.write_text(
        RUN.replace("epochs = 6", "epochs = 1")
        .replace("epochs = 8", "epochs = 2")
        .replace(stages, 'stages = ["small"]')
    )
    out = tmp_path / "shades.safetensors"
    run(recipe, folder / "train", out, "--test-fraction", "0.3", "--split-seed", "1")
    card = weights.load(out).card
    assert [network.name for network in card.networks] == ["small"]
    flags = card.recipe["runs"][0]["flags"]
    assert (flags["test_fraction"], flags["split_seed"]) == (0.3, 1)
    with pytest.raises(SystemExit, match=f"{tmp_path}/none"):
        run(recipe, tmp_path / "none", out)


def test_runs_continue_each_other(recipe: Path, tmp_path: Path) -> None:
    large, averaged, small = chain.plan(chain.load(str(recipe)), tmp_path)
    assert not large.is_started
    assert averaged.is_started
    assert averaged.flags["widths"] == [12, 12, 12]
    assert small.flags["teacher"] == str(averaged.out)
    assert "average_checkpoints" not in small.flags


@pytest.mark.parametrize(
    ("old", "new", "error"),
    [
        ("[cascade]", "[cascades]", "cascade: field required"),
        ('name = "small"', 'name = "large"', "networks: value error, several networks have the name large"),
        ('"small", "large"', '"tiny", "large"', "The stage tiny names none of the networks large, small"),
        ('"small", "large"', '"small:2", "large"', "The stage small:2 is not of the form NETWORK[:flip][:K]"),
        ('"small", "large"', '"small", "large:flop"', "The stage large:flop is not of the form NETWORK[:flip][:K]"),
        ("average_checkpoints = true", "batch_size = 20", "large/2: batch_size cannot change between runs"),
        ('teacher = "large/2"', 'teacher = "small"', "small/1: the teacher small is not an earlier run"),
        ("depth = 2", "deep = 2", "large/1: deep is not a flag"),
        ("depth = 2", 'finetune = "head"', "large/1: a linear head cannot be in a chain"),
        ("depth = 2", "depth = 0", "large/1: --depth: input should be greater than or equal to 1"),
        ("depth = 2", "depth = ", "recipe.toml: Invalid value"),
    ],
)
def test_invalid_recipe_is_one_line(
    recipe: Path, tmp_path: Path, old: str, new: str, error: str, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe.write_text(RUN.replace(old, new, 1))
    with pytest.raises(SystemExit) as exit_info:
        run(recipe, tmp_path / "none", tmp_path / "out.safetensors")
    assert exit_info.value.code == 2
    printed = capsys.readouterr()
    assert error in printed.err
    assert printed.err.count("\n") == 1
    assert not printed.out


@pytest.mark.parametrize(
    ("flags", "error"),
    [
        (("--name", "a b"), "Invalid name 'a b'"),
        (("--out", "x y.safetensors"), "Invalid name 'x y'"),
        (("--out", "recipe.toml", "--name", "x"), "--out: recipe.toml is of an earlier run"),
        (("--out", ".", "--name", "x"), "--out: . is a folder"),
        (("--out", "recipe.toml/x", "--name", "x"), "--out: recipe.toml/x is a folder or is in none"),
    ],
)
def test_name_and_output_are_checked_before_the_data(
    flags: tuple[str, ...], error: str, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with contextlib.chdir(tmp_path), pytest.raises(SystemExit) as exit_info:
        run(recipe, tmp_path / "none", tmp_path / "out.safetensors", *flags)
    assert exit_info.value.code == 2
    assert error in capsys.readouterr().err


def test_damaged_file_of_an_earlier_run_is_one_line(recipe: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "runs/large/1.safetensors"
    damaged.parent.mkdir(parents=True)
    damaged.write_bytes(b"damaged")
    with pytest.raises(SystemExit) as exit_info:
        run(recipe, tmp_path / "none", tmp_path / "out.safetensors")
    assert str(exit_info.value.code).startswith(f"WeightsError: {damaged} is not a safetensors file")


def test_unknown_recipe_names_the_known_ones() -> None:
    with pytest.raises(SettingsError, match="there are cascade, cifar10"):
        chain.load("cifar")


def test_bundled_recipe_is_valid(tmp_path: Path) -> None:
    bundled = chain.load("cifar10")
    assert len(chain.plan(bundled, tmp_path)) == 6
    assert chain.stages(bundled) == ["1", "0", "0:flip:2"]


def test_recipe_for_own_images_starts_from_the_bundled_network(tmp_path: Path) -> None:
    own = chain.load("cascade")
    large, small = chain.plan(own, tmp_path)
    assert large.flags["finetune"] == "all"
    assert small.flags["teacher"] == str(large.out)
    assert chain.stages(own) == ["1", "0"]


def test_choices_of_a_finished_run_do_not_make_it_another(tmp_path: Path, tiny_weights: Path) -> None:
    finished = weights.load(tiny_weights)
    card = finished.card.model_copy(update={"recipe": {"finetune": "none", "class_balance": "weights", "epochs": 3.0}})
    (tmp_path / "large").mkdir()
    out = tmp_path / "large/1.safetensors"
    weights.save(out, card, finished.state, finished.reference_images, finished.reference_probabilities)

    def planned(**flags: object) -> list[Path]:
        table = chain.NetworkTable(name="large", runs=[flags])
        made = chain.ChainFile(networks=[table], cascade=chain.CascadeTable(stages=["large"]))
        return [each.out for each in chain.plan(made, tmp_path)]

    assert planned(class_balance="auto", epochs=3) == [out]
    assert planned(class_balance="auto", finetune="auto") == [out]
    for flags in ({"class_balance": "auto"}, {"epochs": 3}, {"class_balance": "auto", "epochs": 4}):
        with pytest.raises(SettingsError, match="was made by another recipe"):
            planned(**flags)


@pytest.mark.parametrize("arch", ["lenet", "mlp"])
def test_finished_run_of_the_article_networks_is_kept(arch: str, tmp_path: Path, tiny_weights: Path) -> None:
    finished = weights.load(tiny_weights)
    parser = cli.Parser()
    cli.add_flags(parser)
    recipe = cli.from_flags(parser.parse_args(["--arch", arch, "--finetune", "none", "--class-balance", "none"]))
    card = finished.card.model_copy(update={"recipe": recipe.model_dump(mode="json")})
    (tmp_path / arch).mkdir()
    out = tmp_path / arch / "1.safetensors"
    weights.save(out, card, finished.state, finished.reference_images, finished.reference_probabilities)
    table = chain.NetworkTable(name=arch, runs=[{"arch": arch}])
    planned = chain.plan(chain.ChainFile(networks=[table], cascade=chain.CascadeTable(stages=[arch])), tmp_path)
    assert [each.out for each in planned] == [out]


def test_a_run_of_another_recipe_is_refused(recipe: Path, tiny_weights: Path, tmp_path: Path) -> None:
    (tmp_path / "large").mkdir()
    (tmp_path / "large/1.safetensors").write_bytes(tiny_weights.read_bytes())
    with pytest.raises(SettingsError, match=r"large/1\.safetensors was made by another recipe"):
        chain.plan(chain.load(str(recipe)), tmp_path)


def test_provenance_names_commit_and_processor(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor : 0\nmodel name : Example CPU\n")
    assert provenance.machine(torch.device("cpu"), cpuinfo).startswith("Example CPU, ")
    commit = provenance.commit()
    assert commit is None or re.fullmatch(r"[0-9a-f]{12}(-dirty)?", commit)
