"""The loop on 12 x 12 tensors: learning, checkpoints, resumption, interruption, averaging."""

import json
import os
import pty
import re
import signal
import termios
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stderr, suppress
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.support.training import SMALL_RECIPE, equal, shades, small_trainer, state
from training import checkpoint
from training.loader import Batch, Loader
from training.recipe import Recipe
from training.trainer import Diverged, Interrupted, Trainer

VAL = shades(30, seed=1)


class SignallingLoader(Loader):
    """Sends SIGTERM to this process with the batch of one step."""

    def __init__(self, loader: Loader, step: int) -> None:
        self.__dict__ = loader.__dict__
        self._step = step

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        for i, batch in enumerate(super().epoch(epoch, first_step), start=first_step):
            if epoch * self.steps_per_epoch + i == self._step:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch


def fitted(run_dir: Path, recipe: Recipe = SMALL_RECIPE, resume: bool = False, interval_s: float = 60) -> Trainer:
    trainer = small_trainer(recipe)
    if resume:
        trainer.load_state_dict(checkpoint.load(run_dir / "checkpoint.pt"))
    trainer.fit(VAL, run_dir, interval_s)
    return trainer


def lines(run_dir: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def longer(**changes: object) -> Recipe:
    return SMALL_RECIPE.model_copy(update=changes)


def test_network_learns_and_metrics_are_logged(tmp_path: Path) -> None:
    trainer = fitted(tmp_path, longer(epochs=10))
    assert trainer.history[-1].val_accuracy > 0.9
    assert trainer.history[-1].loss < trainer.history[0].loss
    assert lines(tmp_path) == [epoch._asdict() for epoch in trainer.history]
    assert [epoch.epoch for epoch in trainer.history] == list(range(1, 11))


def test_seed_repeats_a_run(tmp_path: Path) -> None:
    first, second = fitted(tmp_path), fitted(tmp_path)
    assert equal(state(first), state(second))
    assert not equal(state(first), state(fitted(tmp_path, longer(seed=1))))


@pytest.mark.slow
@pytest.mark.parametrize("step", [0, 2, 4, 9])
def test_interrupted_run_resumes_bit_identically(tmp_path: Path, step: int) -> None:
    (tmp_path / "whole").mkdir()
    whole = fitted(tmp_path / "whole")
    trainer = small_trainer()
    trainer.loader = SignallingLoader(trainer.loader, step)
    with pytest.raises(Interrupted, match=rf"Interrupted at step {step + 1} of 12; a resumed run continues here"):
        trainer.fit(VAL, tmp_path, checkpoint_interval_s=60)
    resumed = fitted(tmp_path, resume=True)
    assert equal(state(whole), state(resumed))
    assert [e.val_accuracy for e in whole.history] == [e.val_accuracy for e in resumed.history]
    assert [line["epoch"] for line in lines(tmp_path)] == [1, 2, 3, 4]
    assert signal.getsignal(signal.SIGTERM) is not None


def test_checkpoint_is_saved_at_the_interval(tmp_path: Path) -> None:
    trainer, steps = small_trainer(longer(epochs=1)), []
    save = trainer._save
    trainer._save = lambda file: (steps.append(trainer.step), save(file))  # type: ignore[method-assign,assignment,func-returns-value]
    trainer.fit(VAL, tmp_path, checkpoint_interval_s=0)
    assert steps == [1, 2, 3]


def test_finished_run_continues_at_rates_that_fall_again(tmp_path: Path) -> None:
    fitted(tmp_path, longer(epochs=2))
    resumed = fitted(tmp_path, longer(epochs=4, cutout=2), resume=True)
    saved = checkpoint.load(tmp_path / "checkpoint.pt")
    assert saved["step"] == saved["optimizers"][1]["param_groups"][0]["end_step"] == 4 * 3
    assert (saved["recipe"]["epochs"], saved["recipe"]["cutout"]) == (4, 2)
    assert [epoch.epoch for epoch in resumed.history] == [1, 2, 3, 4]


def test_continued_run_averages_its_final_checkpoints(tmp_path: Path) -> None:
    first = state(fitted(tmp_path, longer(epochs=2)))
    for _ in range(2):  # a finished run that is resumed unchanged has the same average
        resumed = fitted(tmp_path, longer(epochs=4, average_checkpoints=True), resume=True)
        assert len(resumed.averaged_checkpoints) == 1
        averaged, last = resumed.final_network().state_dict(), state(resumed)
        for name in ("head.weight", "groups.0.convs.0.weight"):
            torch.testing.assert_close(averaged[name], (first[name] + last[name]) / 2)
        assert not torch.equal(averaged["groups.0.norms.0.running_mean"], last["groups.0.norms.0.running_mean"])


def test_checkpoint_with_former_names_is_resumed(tmp_path: Path) -> None:
    trainer = fitted(tmp_path, longer(epochs=2))
    saved = trainer.state_dict()
    saved["ends"] = [saved["network"]]
    del saved["averaged_checkpoints"]
    other = small_trainer(longer(epochs=4))
    other.load_state_dict(saved)
    assert len(other.averaged_checkpoints) == 1


def test_parameters_are_averaged_and_statistics_recomputed() -> None:
    trainer = small_trainer(longer(average_checkpoints=True))
    other = state(small_trainer(longer(seed=1)))
    trainer.averaged_checkpoints = [other, other]
    averaged, own = trainer.final_network(), state(trainer)
    for name in ("head.weight", "groups.0.convs.0.weight", "whiten.weight"):
        torch.testing.assert_close(averaged.get_parameter(name), (own[name] + 2 * other[name]) / 3)
    norm = averaged.get_submodule("groups.0.norms.0")
    images = torch.cat([batch.images for batch in trainer.loader.epoch(0)]).permute(0, 3, 1, 2)
    with torch.no_grad():
        whitened = averaged.get_submodule("whiten")(averaged.get_submodule("normalize")(images.float()))
        maps = averaged.get_submodule("groups.0.convs.0")(torch.nn.functional.gelu(whitened))
        maps = torch.nn.functional.max_pool2d(maps, 2)
    torch.testing.assert_close(norm.running_mean, maps.mean((0, 2, 3)), atol=0.02, rtol=0.02)
    torch.testing.assert_close(norm.running_var, maps.var((0, 2, 3)), atol=0.02, rtol=0.1)
    assert not averaged.training
    assert norm.momentum == trainer.network.get_submodule("groups.0.norms.0").momentum


def test_frozen_batch_norms_keep_their_statistics(tmp_path: Path) -> None:
    trainer = small_trainer(longer(freeze_bn=True, average_checkpoints=True))
    before = state(trainer)
    trainer.averaged_checkpoints = [before]
    trainer.fit(VAL, tmp_path, checkpoint_interval_s=60)
    averaged = trainer.final_network().state_dict()
    kept = [name for name in before if name.endswith(("running_mean", "running_var"))]
    assert kept
    assert all(torch.equal(before[name], found[name]) for name in kept for found in (state(trainer), averaged))
    assert not torch.equal(before["head.weight"], averaged["head.weight"])


class WrongLabels:
    """A teacher whose targets are the class after the label."""

    name = "wrong"

    def __init__(self, labels: Tensor) -> None:
        self._targets = torch.nn.functional.one_hot((labels + 1) % 3, 3).float()

    def __call__(self, index: Tensor, images: Tensor) -> Tensor:
        return self._targets[index]


@pytest.mark.parametrize(("weight", "accuracy"), [(1.0, 0.0), (0.0, 1.0)])
def test_distill_weight_shares_the_loss(tmp_path: Path, weight: float, accuracy: float) -> None:
    trainer = small_trainer(longer(epochs=10, distill_weight=weight), teacher=WrongLabels(shades(60).labels))
    trainer.fit(VAL, tmp_path, checkpoint_interval_s=60)
    assert trainer.history[-1].val_accuracy == pytest.approx(accuracy, abs=0.1)


def test_divergence_keeps_the_last_checkpoint(tmp_path: Path) -> None:
    fitted(tmp_path, longer(epochs=1))
    before = (tmp_path / "checkpoint.pt").read_bytes()
    with pytest.raises(Diverged, match="The loss is nan at step 4; a lower learning rate may help"):
        fitted(tmp_path, longer(muon_lr=float("nan")), resume=True)
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


def test_non_finite_weights_are_not_saved() -> None:
    trainer = small_trainer()
    next(trainer.network.parameters()).data.fill_(float("inf"))
    with pytest.raises(Diverged, match="Non-finite weight at step 0"):
        trainer.state_dict()


def test_progress_bar_shows_time_and_metrics(tmp_path: Path) -> None:
    trainer = small_trainer(longer(epochs=1, batch_size=2), shades(120))
    terminal, end = pty.openpty()
    termios.tcsetwinsize(end, (24, 160))
    with ThreadPoolExecutor(1) as pool:
        output = pool.submit(read_to_the_end, terminal)
        with open(end, "w") as errors, redirect_stderr(errors):
            trainer.fit(VAL, tmp_path, checkpoint_interval_s=60)
    clocks, status = r"\[\d\d:\d\d<\d\d:\d\d, .*batch/s", r"\d+ images/s, loss \d\.\d{3}, accuracy [\d.]+%"
    assert re.search(rf"epoch 1: +\d+%\|.*\| \d+/60 {clocks}, {status}", output.result())


def read_to_the_end(terminal: int) -> str:
    output = b""
    with open(terminal, "rb", buffering=0) as stream, suppress(OSError):  # a closed terminal is an error on Linux
        while part := stream.read(4096):
            output += part
    return output.decode()


def test_tensorboard_gets_every_epoch_once(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for resume in (False, True):
        trainer = small_trainer(longer(epochs=3))
        if resume:
            trainer.load_state_dict(checkpoint.load(tmp_path / "checkpoint.pt"))
        trainer.fit(VAL, tmp_path, checkpoint_interval_s=60, tensorboard=True)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    for name in ("loss", "train_accuracy", "val_accuracy", "images_per_s"):
        points = [(point.step, point.value) for point in events.Scalars(name)]
        assert points == [(e.epoch, pytest.approx(getattr(e, name), rel=1e-5)) for e in trainer.history]
