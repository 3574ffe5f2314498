"""A run from its first step to its last: steps, epochs, checkpoints, its journal, and the average at its end."""

import copy
import json
import math
import shutil
import signal
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from app.errors import SettingsError, ThirtytwoError
from training import checkpoint, metrics, optimizers
from training.data import Split
from training.distributed import Ranks
from training.loader import Batch, Batches
from training.recipe import Recipe

AVERAGED = 10  # batches that an averaged network's normalisation is measured on


class Diverged(ThirtytwoError):
    """The loss is no longer a number."""


class Epoch(NamedTuple):
    """What one pass showed. Accuracies are shares; `seconds` counts training since the run began, over all resumes."""

    epoch: int
    seconds: float
    images_per_s: float
    loss: float
    train_accuracy: float
    holdout_accuracy: float


class Trainer:
    """A network in training: what a checkpoint holds, and one pass over the data at a time."""

    def __init__(
        self,
        network: nn.Module,
        recipe: Recipe,
        batches: Batches,
        device: torch.device,
        ranks: Ranks,
    ) -> None:
        self.network = network.to(device).to(memory_format=torch.channels_last)
        self.recipe = recipe
        self.batches = batches
        self.device = device
        self.ranks = ranks
        self.total_steps = recipe.steps or math.ceil(recipe.epochs * batches.per_epoch)
        self.optimizers = optimizers.build(
            self.network, recipe, batches.batch_size, self.total_steps, batches.per_epoch
        )
        self.step = 0
        self.seconds = 0.0
        self.history: list[Epoch] = []
        self.ends: list[checkpoint.State] = []  # what this run began or ended with before it went on
        if recipe.average and recipe.initial_weights:
            self.ends.append(copy.deepcopy(self.network.state_dict()))
        self._parallel = ranks.wrap(self.network)

    @property
    def finished(self) -> bool:
        return self.step >= self.total_steps

    @property
    def between_epochs(self) -> bool:
        return self.finished or self.step % self.batches.per_epoch == 0

    def state(self) -> checkpoint.State:
        """What a checkpoint holds; raises Diverged, so that a broken network never replaces a sound one."""
        if not all(torch.isfinite(value).all() for value in self.network.state_dict().values()):
            raise Diverged(f"A weight is no number any more at step {self.step}; a lower learning rate may help.")
        return checkpoint.of(self.network, self.optimizers) | {
            "recipe": asdict(self.recipe),
            "ends": self.ends,
            "total_steps": self.total_steps,
            "step": self.step,
            "seconds": self.seconds,
            "history": [tuple(epoch) for epoch in self.history],
        }

    def restore(self, state: checkpoint.State) -> None:
        """Rates and their ends stay those of this trainer's recipe: it may be longer than the one that was begun.

        What a finished run ended with is kept for the average, where the recipe asks for one.
        """
        groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        planned = [{key: value for key, value in group.items() if key != "params"} for group in groups]
        checkpoint.into(self.network, self.optimizers, state)
        groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        for group, plan in zip(groups, planned, strict=True):
            group.update(plan)
        self.step, self.seconds, self.ends = state["step"], state["seconds"], state["ends"]
        if self.recipe.average and state["total_steps"] <= self.step < self.total_steps:
            self.ends.append(state["network"])
        self.history = [Epoch(*epoch) for epoch in state["history"]]

    def result(self) -> nn.Module:
        """The network, or where the recipe asks for it the average of all that this run ended with."""
        if not (self.recipe.average and self.ends):
            return self.network
        mean = average(self.network, self.ends)
        if not self.recipe.freeze_norms:
            batches = islice(self.batches.epoch(len(self.history)), AVERAGED)
            follow(mean, (batch.images.to(self.device).permute(0, 3, 1, 2) for batch in batches))
        return mean

    def run_epoch(self, after_step: Callable[[], None]) -> tuple[float, float, float]:
        """One pass, or what is left of it; gives images/s, mean loss and accuracy. Raises Diverged."""
        number, first = divmod(self.step, self.batches.per_epoch)
        last = min(self.batches.per_epoch, first + self.total_steps - self.step)
        loss_sum, hits, count, begun = 0.0, 0.0, 0.0, time.monotonic()
        self._learn()
        quiet = None if self.ranks.first else True  # None: a bar on terminals only
        with tqdm(total=last - first, desc=f"epoch {number + 1}", unit="batch", leave=False, disable=quiet) as bar:
            for _, batch in zip(range(first, last), self.batches.epoch(number, first), strict=False):
                step_begun = time.monotonic()
                loss, correct, learnt = self._step(batch)
                loss_sum, hits, count = loss_sum + loss, hits + correct, count + learnt
                self.seconds += time.monotonic() - step_begun
                rate = self.ranks.world * count / (time.monotonic() - begun)
                told = f"{rate:.0f} images/s, loss {loss_sum / count:.3f}, accuracy {hits / count:.2%}"
                bar.set_postfix_str(told, refresh=False)  # the bar itself knows when a terminal wants a new line
                bar.update()
                after_step()
        loss_sum, hits, count = self.ranks.total(loss_sum, hits, count)
        return count / (time.monotonic() - begun), loss_sum / count, hits / count

    def _learn(self) -> None:
        """Training mode, but for normalisation that is to stay as it is."""
        self.network.train()
        if self.recipe.freeze_norms:
            for module in self.network.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()

    def _step(self, batch: Batch) -> tuple[float, int, int]:
        """One update; gives the summed loss, the right answers and the images of this process's share."""
        if self.ranks.world == 1:  # DistributedDataParallel settles at its start whose gradients it waits for
            optimizers.freeze_ended(self.optimizers, self.step)
        images = batch.images.to(self.device).permute(0, 3, 1, 2)
        labels = batch.labels.to(self.device)
        with torch.autocast(self.device.type, torch.bfloat16):
            logits = self._parallel(images)
        loss = self._loss(logits, labels, batch.targets)
        if not torch.isfinite(loss):
            raise Diverged(f"The loss is {loss.item()} at step {self.step}; a lower learning rate may help.")
        # Muon's companions want the sum over the whole batch; the processes' gradients are averaged
        scale = self.ranks.world if self.recipe.optimizer == "muon" else 1 / len(labels)
        optimizers.update(self.optimizers, loss * scale, self.step)
        self.step += 1
        return loss.item(), int((logits.argmax(1) == labels).sum()), len(labels)

    def _loss(self, logits: Tensor, labels: Tensor, targets: Tensor | None) -> Tensor:
        """Summed over the batch: from the labels, and where there is a teacher mostly from its answers."""
        own = F.cross_entropy(logits, labels, label_smoothing=self.recipe.label_smoothing, reduction="sum")
        if targets is None:
            return own
        taught = F.cross_entropy(logits, targets.to(self.device), reduction="sum")
        return torch.lerp(own, taught, self.recipe.teacher_share)


@torch.no_grad()
def average(network: nn.Module, others: Sequence[checkpoint.State]) -> nn.Module:
    """A network with the mean of its own and the other states' parameters, and its own normalisation."""
    mean = copy.deepcopy(network)
    for name, parameter in mean.named_parameters():
        states = [parameter, *(state[name].to(parameter.device) for state in others)]
        parameter.copy_(torch.stack(states).mean(0))
    return mean


@torch.no_grad()
def follow(network: nn.Module, images: Iterable[Tensor]) -> None:
    """Gives the normalisation the statistics of the images, uint8 [N, 3, H, W], as they are seen in training."""
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    before = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the mean over all batches
    network.train()
    for batch in images:
        with torch.autocast(batch.device.type, torch.bfloat16):
            network(batch)
    for norm, momentum in zip(norms, before, strict=True):
        norm.momentum = momentum
    network.eval()


class Journal:
    """Begins with the history so far: neither a kill nor an older run leaves a line too few or too many.

    Raises OSError on a full disk, SettingsError where TensorBoard is wanted and not installed.
    """

    def __init__(self, folder: Path, history: Sequence[Epoch], tensorboard: bool) -> None:
        self._board = _board(folder / "tensorboard") if tensorboard else None
        self._file = folder / "metrics.jsonl"
        self._file.write_text("")
        for epoch in history:
            self.add(epoch)

    def add(self, epoch: Epoch) -> None:
        with self._file.open("a") as lines:
            print(json.dumps(epoch._asdict()), file=lines)
        if self._board:
            for name in ("loss", "train_accuracy", "holdout_accuracy", "images_per_s"):
                self._board.add_scalar(name, getattr(epoch, name), epoch.epoch)
            self._board.flush()


def _board(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise SettingsError("--tensorboard needs an extra: pip install -e '.[tensorboard]'.") from None
    shutil.rmtree(folder, ignore_errors=True)
    return SummaryWriter(str(folder))


class Stopped(Exception):
    """A person or the machine asked for an end; the checkpoint is written."""


def train(trainer: Trainer, holdout: Split, run: Path, checkpoint_s: float, tensorboard: bool = False) -> None:
    """Runs to the end; writes checkpoints and its journal into the run's folder. Raises Diverged or Stopped."""
    file, saved_at, ranks = run / "checkpoint.pt", time.monotonic(), trainer.ranks
    journal = Journal(run, trainer.history, tensorboard) if ranks.first else None

    def save() -> None:
        nonlocal saved_at
        if ranks.first:
            checkpoint.save(file, trainer.state())
        saved_at = time.monotonic()

    def stop_if_asked() -> None:
        if ranks.total(stop.signal)[0] > 0:
            save()
            raise Stopped(f"Stopped at step {trainer.step} of {trainer.total_steps}; --resume goes on from here.")

    def after_step() -> None:
        if trainer.between_epochs:
            return  # a checkpoint without the epoch's figures would lose them for good; they come next
        if time.monotonic() - saved_at > checkpoint_s:
            save()
        stop_if_asked()

    with _StopRequest() as stop:
        while not trainer.finished:
            rate, loss, train_accuracy = trainer.run_epoch(after_step)
            accuracy = metrics.accuracy(metrics.logits(trainer.network, holdout.images), holdout.labels)
            epoch = Epoch(len(trainer.history) + 1, trainer.seconds, rate, loss, train_accuracy, accuracy)
            trainer.history.append(epoch)
            save()
            if journal:
                journal.add(epoch)
                _tell(trainer, epoch)
            stop_if_asked()


def _tell(trainer: Trainer, epoch: Epoch) -> None:
    left = (trainer.total_steps - trainer.step) * trainer.seconds / trainer.step
    print(
        f"epoch {epoch.epoch:3d}  loss {epoch.loss:.3f}  train {epoch.train_accuracy:.2%}  held out "
        f"{epoch.holdout_accuracy:.2%}  {epoch.images_per_s:.0f} images/s  {epoch.seconds:.0f} s, {left:.0f} s to go",
        flush=True,
    )


class _StopRequest:
    """Turns Ctrl-C and SIGTERM into a flag that is read between steps, where the state is whole."""

    def __enter__(self) -> "_StopRequest":
        self.signal = 0
        self._before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        self.signal = number
