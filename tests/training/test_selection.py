"""What `auto` chooses for a data set, and the weights file of a head."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from app.errors import DataError, SettingsError
from app.model import weights
from app.model.weights import BUNDLED
from app.settings import Settings
from tests.conftest import serving, untrained, write
from tests.support.training import shades
from training import calibration, checkpoint, finetune, ood, selection, train
from training.data import Dataset, Split
from training.plan import Choice, Plan
from training.recipe import Recipe
from training.selection import Validation


def chosen(recipe: Recipe, given: Sequence[str], split: Split, processes: int = 1) -> Plan:
    held_out = selection.validation(recipe, given, split)
    return selection.choose(recipe, given, split, int(split.labels.max()) + 1, held_out, processes)


def noise(labels: list[int]) -> Split:
    images = torch.randint(
        0, 256, (len(labels), 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    return Split(images, torch.tensor(labels))


def choose(split: Split, *given: str, recipe: Recipe | None = None, processes: int = 1) -> dict[str, object]:
    plan = chosen(recipe or Recipe(), given, split, processes)
    return {choice.field: choice.value for choice in plan.choices} | {"recipe": plan.recipe}


def test_few_similar_images_get_a_head(tiny_weights: Path) -> None:
    plan = chosen(Recipe(initial_weights=str(tiny_weights)), (), shades(60, 32))
    assert plan.recipe.finetune == "head"
    assert plan.head is not None
    assert [choice.field for choice in plan.choices] == ["class_balance", "finetune", "hflip", "head_c"]
    assert "cross-validated balanced accuracy" in plan.choices[1].reason


@pytest.mark.parametrize(
    ("given", "values", "reason"),
    [
        (["widths"], {"widths": (8, 8)}, "--widths is given"),
        (["teacher"], {"teacher": "x"}, "--teacher is given"),
        (["image_size"], {"image_size": 48}, "the bundled network is for 32 pixels"),
    ],
)
def test_network_flags_train_from_nothing(given: list[str], values: dict[str, object], reason: str) -> None:
    plan = chosen(Recipe.model_validate(values), given, shades(60))
    assert (plan.recipe.finetune, plan.recipe.initial_weights, plan.head) == ("none", "", None)
    assert next(choice.reason for choice in plan.choices if choice.field == "finetune") == reason


def test_explicit_none_keeps_every_default() -> None:
    plan = chosen(Recipe(finetune="none"), ["finetune"], shades(60))
    assert plan.recipe == Recipe(finetune="none", class_balance="none")


def test_several_processes_do_not_fit_a_head() -> None:
    assert choose(shades(60), processes=2)["finetune"] == "none"


def test_head_needs_one_process() -> None:
    with pytest.raises(SettingsError, match="--finetune head needs one process"):
        selection.prepared(Recipe(finetune="head"), ["finetune"], 2)


def test_zero_epochs_need_as_many_classes_as_the_head(tiny_weights: Path) -> None:
    with pytest.raises(DataError, match="--epochs 0 keeps the head of 10 classes; the data have 3"):
        chosen(Recipe(initial_weights=str(tiny_weights), epochs=0), ["epochs"], shades(60, 32))


def test_given_values_are_kept(tiny_weights: Path) -> None:
    recipe = Recipe(initial_weights=str(tiny_weights), epochs=3, muon_lr=0.5)
    found = chosen(recipe, ["epochs", "muon_lr", "initial_weights"], shades(60, 32)).recipe
    assert (found.finetune, found.epochs, found.muon_lr, found.batch_size) == ("all", 3, 0.5, 32)
    assert found.widths == (8, 8, 8)
    assert not chosen(recipe, ["epochs", "initial_weights"], shades(60, 32)).trial


def test_features_that_do_not_separate_lead_to_a_trial(tiny_weights: Path) -> None:
    plan = chosen(Recipe(initial_weights=str(tiny_weights)), (), noise([0, 1, 2] * 20))
    assert (plan.recipe.finetune, plan.trial, plan.recipe.batch_size, plan.recipe.cutout) == ("all", True, 32, 0)
    assert plan.head is not None
    assert "--muon-lr 0.02: fine-tuning: a seventh of the default" in map(str, plan.choices)


def test_given_start_is_used_where_its_features_do_not_separate(tiny_weights: Path) -> None:
    images = torch.randint(0, 256, (1, 32, 32, 3), dtype=torch.uint8).expand(3001, -1, -1, -1)
    plan = chosen(Recipe(initial_weights=str(tiny_weights)), (), Split(images, torch.arange(3001) % 3))
    assert (plan.recipe.finetune, plan.recipe.initial_weights) == ("all", str(tiny_weights))


def test_image_size_is_that_of_the_start(tmp_path: Path) -> None:
    file = tmp_path / "large.safetensors"
    write(file, untrained("large", 8, input_size=48))
    recipe = Recipe(initial_weights=str(file), finetune="head")
    assert selection.prepared(recipe, ()).image_size == 48
    with pytest.raises(SettingsError, match=rf"^--finetune head needs --image-size 48, the size of {file}\.$"):
        selection.prepared(recipe, ["image_size"])
    with pytest.raises(SettingsError, match="--finetune head needs --image-size 32, the size of "):
        selection.prepared(Recipe(finetune="head", image_size=64), ["image_size"])
    assert selection.prepared(Recipe(image_size=64), ["image_size"]).image_size == 64
    plan = chosen(Recipe(initial_weights=str(file)), ["image_size"], shades(60, 32))
    assert (plan.recipe.finetune, plan.head, plan.trial) == ("all", None, False)


def test_network_wins_by_more_than_a_standard_error(tiny_weights: Path) -> None:
    split, recipe = noise([0, 1, 2] * 20), Recipe(initial_weights=str(tiny_weights))
    plan = chosen(recipe, (), split)
    assert plan.head is not None
    assert plan.backbone is not None
    val = split.select(selection.validation(recipe, (), split).mask)
    head_logits = finetune.start_logits(plan.backbone, plan.head, val.images)
    perfect = torch.nn.functional.one_hot(val.labels, 3).float()
    better, reason = finetune.wins(perfect, head_logits, val, plan.head)
    assert better
    assert reason.startswith("validation accuracy 100.0% against ")
    assert not finetune.wins(head_logits, head_logits, val, plan.head)[0]


def test_trial_is_resumed_from_a_checkpoint(tiny_weights: Path, tmp_path: Path) -> None:
    made = chosen(Recipe(initial_weights=str(tiny_weights)), (), noise([0, 1, 2] * 20))
    checkpoint.save(tmp_path / "x.pt", made.state_dict())
    state = checkpoint.load(tmp_path / "x.pt")
    found = selection.resumed(made.recipe, (), state)
    assert (found.choices, found.trial) == (made.choices, True)
    assert found.head is not None
    assert made.head is not None
    for one, other in zip(found.head, made.head, strict=True):
        np.testing.assert_array_equal(one, other)
    assert not selection.resumed(made.recipe, ["epochs"], state).trial
    assert selection.resumed(made.recipe, (), {}) == Plan(made.recipe, [])
    with pytest.raises(DataError, match="has changed since the run started"):
        selection.resumed(made.recipe, (), state | {"start": "other"})


def test_own_validation_images_are_not_of_the_head(tiny_weights: Path) -> None:
    split, held_out = shades(60, 32), Validation(torch.arange(60) >= 45, own=True)
    recipe = Recipe(initial_weights=str(tiny_weights), finetune="head")
    head = selection.choose(recipe, (), split, 3, held_out).head
    alone = selection.choose(recipe, (), split.select(~held_out.mask), 3, Validation(torch.zeros(45).bool())).head
    assert head is not None
    assert alone is not None
    assert head.labels.tolist() == split.labels[:45].tolist()
    np.testing.assert_array_equal(head.weight, alone.weight)
    np.testing.assert_array_equal(head.start_weight, head.weight)


def test_class_of_one_image_is_one_line(tiny_weights: Path) -> None:
    recipe = Recipe(initial_weights=str(tiny_weights))
    with pytest.raises(DataError, match="needs two training images: one of them is for validation"):
        chosen(recipe, (), noise([0, 0, 1, 1, 2]))
    held_out = Validation(torch.arange(6) > 4, own=True)
    with pytest.raises(DataError, match="needs two training images: a head is cross-validated"):
        selection.choose(recipe, (), noise([0, 0, 1, 1, 2, 2]), 3, held_out)


def test_sample_has_two_images_of_every_class() -> None:
    labels = torch.zeros(4000, dtype=torch.int64)
    labels[-6:] = torch.tensor([1, 1, 2, 2, 2, 3])
    mask = torch.arange(4000) % 4 == 0
    positions = selection.sample(labels, mask, 500, seed=0)
    assert len(positions) == len(positions.unique()) == 500
    assert labels[positions].bincount()[1:].tolist() == [2, 2, 1]
    assert mask[positions].sum() <= 2  # a validation image only where a class has fewer others
    assert len(selection.sample(labels, mask, 3, seed=0)) == 7


def test_head_has_a_row_for_a_class_without_images(tiny_weights: Path) -> None:
    recipe, split = Recipe(initial_weights=str(tiny_weights)), shades(60, 32)
    plan = selection.choose(recipe, (), split, 5, selection.validation(recipe, (), split))
    assert plan.head is not None
    assert plan.head.weight.shape == (5, 8)


@pytest.mark.parametrize(("counts", "balance"), [([50, 10], "none"), ([51, 10], "weights")])
def test_imbalance_above_five_to_one_is_weighted(counts: list[int], balance: str) -> None:
    labels = torch.arange(2).repeat_interleave(torch.tensor(counts))
    split = Split(torch.zeros(len(labels), 12, 12, 3, dtype=torch.uint8), labels)
    assert choose(split, recipe=Recipe(finetune="none"))["class_balance"] == balance
    assert "class_balance" not in choose(split, "class_balance", recipe=Recipe(finetune="none", class_balance="none"))


def test_choice_reads_as_a_flag() -> None:
    assert str(Choice("hflip", False, "why")) == "--no-hflip: why"
    assert str(Choice("batch_size", 32, "why")) == "--batch-size 32: why"
    assert str(Choice("muon_lr", 0.0123456, "why")) == "--muon-lr 0.01235: why"


def test_class_name_that_no_card_holds_is_one_line(tiny_weights: Path) -> None:
    split, recipe = shades(60, 32), Recipe(initial_weights=str(tiny_weights), finetune="head", head_c=0.1)
    held_out = selection.validation(recipe, (), split)
    plan = selection.choose(recipe, (), split, 3, held_out)
    dataset = Dataset("noise", ["a", "b", "c" * 201], split, split, [])
    assert plan.head is not None
    assert plan.backbone is not None
    with pytest.raises(SettingsError, match=r"^Invalid classes 'ccc"):
        finetune.compose("x", dataset, plan.recipe, plan.backbone, plan.head, held_out, "cpu")


@pytest.mark.slow
def test_threshold_is_of_images_that_the_head_leaves_out(tiny_weights: Path) -> None:
    split, recipe = noise(list(range(3)) * 180), Recipe(initial_weights=str(tiny_weights), finetune="head")
    held_out = selection.validation(recipe, (), split)
    plan = selection.choose(recipe, ["hflip"], split, 3, held_out)
    assert plan.head is not None
    assert plan.backbone is not None
    head = plan.head._replace(hflip=False)
    dataset = Dataset("noise", ["a", "b", "c"], split, split, [])
    composed = finetune.compose("x", dataset, plan.recipe, plan.backbone, head, held_out, "cpu")
    assert np.array_equal(composed.state["head.weight"], (head.weight * 8).astype(np.float16))
    start = composed._replace(state={**composed.state, "head.weight": (head.start_weight * 8).astype(np.float16)})
    scores = ood.scores(calibration.with_card(start), split.select(held_out.mask).images, "cpu")
    assert np.quantile(scores, 0.95) == pytest.approx(0.95, abs=0.02)


@pytest.mark.slow
def test_two_lines_train_and_serve_a_head(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "x.safetensors"
    train.main(["--data", str(folder), "--out", str(out), "--run-dir", str(tmp_path / "run"), "--finetune", "head"])
    printed = capsys.readouterr().out
    assert "hflip: cross-validated accuracy" in printed
    loaded = weights.load(out)
    bundled = weights.load(BUNDLED)
    assert loaded.card.recipe["initial_weights"].endswith(bundled.version)
    assert loaded.card.test_accuracy is not None
    assert loaded.card.test_accuracy > 0.9
    assert loaded.card.results["cross_validated_images"] == 120
    evaluation = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert evaluation["balanced_accuracy"] == pytest.approx(loaded.card.test_accuracy, abs=1e-5)
    assert evaluation["majority_baseline"] == pytest.approx(1 / 3)
    assert "## Recipe" in (tmp_path / "run" / "report.md").read_text()
    with serving(Settings(weights=out, max_batch=2)) as client:
        files = [("file", ("x.png", next((folder / "test" / "dim").iterdir()).read_bytes()))]
        assert client.post("/predict", files=files).json()["predictions"][0]["label"] == "dim"
    with pytest.raises(SystemExit) as exit_info:
        train.main(["--data", str(folder), "--out", str(out), "--run-dir", str(tmp_path / "other")])
    assert exit_info.value.code == 2
    assert not (tmp_path / "other").exists()


@pytest.mark.slow
def test_report_of_a_head_is_on_the_own_validation_part(folder: Path, tmp_path: Path) -> None:
    for part, source in (("train", "train"), ("val", "test")):
        (tmp_path / "data" / part).parent.mkdir(exist_ok=True)
        (tmp_path / "data" / part).symlink_to(folder / source)
    out, run_dir = tmp_path / "x.safetensors", tmp_path / "run"
    train.main(["--data", str(tmp_path / "data"), "--out", str(out), "--run-dir", str(run_dir), "--finetune", "head"])
    card = weights.load(out).card
    assert (card.results["cross_validated_images"], card.results["val_images"], card.test_accuracy) == (120, 30, None)
    assert json.loads((run_dir / "evaluation.json").read_text())["images"] == 30
    assert "x, validation images" in (run_dir / "report.md").read_text()


@pytest.mark.slow
def test_resumed_run_compares_with_the_head_again(
    tiny_weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.savez(tmp_path / "noise.npz", images=noise([0] * 60).images.numpy(), labels=np.arange(60) % 3)
    flags = ["--data", str(tmp_path / "noise.npz"), "--initial-weights", str(tiny_weights), "--no-test"]
    flags += ["--out", str(tmp_path / "x.safetensors"), "--run-dir", str(tmp_path / "run")]
    lines = []
    for resume in ([], ["--resume"]):
        train.main([*flags, *resume])
        lines.append([line for line in capsys.readouterr().out.splitlines() if " of a head, " in line])
        (tmp_path / "x.safetensors").unlink()
    assert len(lines[0]) == 1
    assert lines[0] == lines[1]
