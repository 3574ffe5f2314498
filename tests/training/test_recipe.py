import argparse

import pytest
from pydantic import ValidationError

from app.errors import SettingsError
from training import cli, evaluate, train
from training.recipe import DEFAULT_RECIPES, DEPRECATED_NAMES, SECTIONS, Recipe


def recipe(*flags: str, resumed_from: Recipe | None = None) -> Recipe:
    parser = cli.Parser()
    cli.add_flags(parser)
    return cli.from_flags(parser.parse_args(flags), resumed_from)


def test_flags_override_the_defaults() -> None:
    found = recipe(
        "--widths", "8,16", "--no-hflip", "--jpeg-quality", "40,60", "--epochs", "2.5", "--optimizer", "adam"
    )
    assert found == Recipe(widths=(8, 16), hflip=False, jpeg_quality=(40, 60), epochs=2.5, optimizer="adam")


def test_each_architecture_has_its_recipe() -> None:
    assert recipe() == Recipe() == DEFAULT_RECIPES["convnet"]
    assert recipe("--arch", "lenet", "--lr", "0.1") == DEFAULT_RECIPES["lenet"].model_copy(update={"lr": 0.1})
    assert recipe("--arch", "mlp").max_steps == 1000


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--val-fraction", "100"], "--val-fraction: input should be less than 1, not '100'."),
        (["--widths", "8,0"], "--widths: input should be greater than 0, not '0'."),
        (["--widths", ""], "--widths: input should be a valid integer"),
        (["--head-lr", "0"], "--head-lr: input should be greater than 0, not '0'."),
        (["--muon-lr", "nan"], "--muon-lr: input should be a finite number, not 'nan'."),
        (["--depth", "two"], "--depth: input should be a valid integer"),
        (["--cutout", "40"], "--cutout is at most --image-size."),
        (["--random-crop-padding", "32"], "--random-crop-padding is below --image-size."),
        (["--arch", "lenet", "--image-size", "48"], "--arch lenet needs --image-size 32."),
        (["--epochs", "0"], "--epochs 0 needs --initial-weights."),
        (["--epochs", "0", "--initial-weights", "x", "--finetune", "head"], "--finetune head excludes --epochs 0."),
        (["--widths", "8,8,8,8,8"], "--widths of 5 groups needs --image-size 33."),
        (["--freeze-bn"], "--freeze-bn needs --initial-weights."),
        (["--online-teacher"], "--online-teacher needs --teacher."),
        (["--mixup", "0.5"], "--mixup needs --online-teacher."),
        (["--epochs", "inf"], "--epochs: input should be a finite number, not 'inf'."),
        (["--seed", str(1 << 64)], "--seed has at most 64 bits."),
        (["--jpeg-quality", "90,50"], "--jpeg-quality is LOW,HIGH from 1 to 100."),
    ],
)
def test_invalid_values_are_one_line(flags: list[str], message: str) -> None:
    with pytest.raises(SettingsError) as error:
        recipe(*flags)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_resumed_run_keeps_its_immutable_fields() -> None:
    checkpointed = Recipe(widths=(8, 8), cutout=3)
    assert recipe("--epochs", "50", resumed_from=checkpointed) == checkpointed.model_copy(update={"epochs": 50.0})
    with pytest.raises(SettingsError, match=r"^--resume cannot change --widths, --seed\.$"):
        recipe("--widths", "8,16", "--seed", "3", resumed_from=checkpointed)


def test_given_epochs_replace_steps_that_are_not_given() -> None:
    assert recipe("--arch", "mlp", "--epochs", "5").max_steps == 0
    assert recipe("--epochs", "50", resumed_from=Recipe(max_steps=9)) == Recipe(epochs=50)
    assert recipe("--epochs", "50", "--max-steps", "7").max_steps == 7


def test_auto_keeps_the_choice_of_a_resumed_run() -> None:
    checkpointed = Recipe(finetune="all", initial_weights="x", class_balance="weights")
    assert recipe("--class-balance", "auto", "--finetune", "auto", resumed_from=checkpointed) == checkpointed
    changed = recipe("--class-balance", "none", resumed_from=checkpointed)
    assert (changed.class_balance, changed.finetune) == ("none", "all")
    with pytest.raises(SettingsError, match=r"^--resume cannot change --finetune\.$"):
        recipe("--finetune", "head", resumed_from=checkpointed)


def test_help_shows_defaults_choices_and_bounds() -> None:
    parser = cli.Parser(formatter_class=lambda prog: argparse.HelpFormatter(prog, width=300))
    cli.add_flags(parser)
    text = parser.format_help()
    assert "[0.05; > 0 and < 1]" in text
    assert "[128,384,512]" in text
    assert "--arch {convnet,lenet,mlp}" in text
    assert "--hflip, --no-hflip" in text
    assert "alternating each epoch (airbench) [on]" in text
    assert "holdout" not in text
    assert "[]" not in text
    assert all(field.description for section in SECTIONS for field in section.model_fields.values())


@pytest.mark.parametrize("flags", [["--nonsense"], ["--arch", "resnet"], ["--epochs"]])
def test_unusable_command_line_is_one_line(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        train.parse(["--data", "x", *flags])
    assert exit_info.value.code == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_interrupt_is_one_line_with_exit_code_130(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info, cli.errors_in_one_line():
        raise KeyboardInterrupt
    assert exit_info.value.code == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_former_flags_warn_and_work(caplog: pytest.LogCaptureFixture) -> None:
    flags = ["--holdout=0.2", "--no-flip", "--skip-test", "--average", "--checkpoint-s", "9", "--filter-lr", "0.3"]
    arguments = train.parse(["--data", "x", *flags])
    assert (arguments.no_test, arguments.checkpoint_interval_s) == (True, 9.0)
    found = cli.from_flags(arguments)
    assert found == Recipe(val_fraction=0.2, hflip=False, average_checkpoints=True, muon_lr=0.3)
    assert "--holdout is deprecated; use --val-fraction" in caplog.text
    assert len(caplog.records) == len(flags) - 2
    assert evaluate.parse(["--data", "x", "--quick"]).no_robustness


def test_former_names_in_a_checkpoint_are_read() -> None:
    former = {old: getattr(Recipe(), new) for old, new in DEPRECATED_NAMES.items()}
    assert Recipe.model_validate(former | {"filter_lr": 0.3}) == Recipe(muon_lr=0.3)
    with pytest.raises(ValidationError, match="Extra inputs"):
        Recipe.model_validate({"nonsense": 1})
