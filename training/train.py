"""Trains a network on a data folder and writes one weights file.

    python -m training.train --data DIR --out weights/cifar10.safetensors

The default recipe and the figures it reached are in docs/training.md.
"""

import argparse
import ctypes
import json
import logging
import math
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from app.errors import ThirtytwoError
from app.model.engine import pick_device
from app.model.networks import ConvNet
from training import augment, checkpoint, data, export, measures, optimizers, predict
from training.data import DataSet, Split
from training.recipe import Recipe, add_flags, from_flags

logger = logging.getLogger("training")


class Diverged(ThirtytwoError):
    """The loss is no longer a number."""


class Stopped(Exception):
    """A person or the machine asked for an end; the checkpoint is written."""


class Epoch(NamedTuple):
    """What one pass showed. Accuracies are shares; `seconds` counts training since the run began, over all resumes."""

    epoch: int
    seconds: float
    images_per_s: float
    loss: float
    train_accuracy: float
    holdout_accuracy: float


class Batches:
    """Augmented batches in an order that depends on seed and step only, so that a run can resume at any step."""

    def __init__(self, split: Split, recipe: Recipe, fill: Tensor) -> None:
        self.split = split
        self.recipe = recipe
        self.fill = fill  # colour of covered squares, uint8 [3]
        self.padded = augment.pad(split.images, recipe.translate)
        self.batch_size = min(recipe.batch_size, len(split))
        self.per_epoch = len(split) // self.batch_size

    def epoch(self, number: int, first: int = 0) -> Iterator[Split]:
        """The batches of an epoch from number `first` on; the few images left over wait for the next shuffle."""
        recipe, size = self.recipe, self.batch_size
        order = torch.randperm(len(self.split), generator=_generator(recipe.seed, number, 0))
        mirrored = augment.alternate_flips(len(self.split), number, recipe.seed)
        for i in range(first, self.per_epoch):
            chance = _generator(recipe.seed, number, i + 1)
            index = order[i * size : (i + 1) * size]
            images = augment.crop(self.padded, index, recipe.image_size, mirrored[index], chance)
            images = augment.cutout(images, recipe.cutout, self.fill, chance)
            images = augment.recompress(images, recipe.jpeg, recipe.jpeg_quality, chance)
            yield Split(images, self.split.labels[index])


class Trainer:
    """A network in training: what a checkpoint holds, and one pass over the data at a time."""

    def __init__(self, network: ConvNet, recipe: Recipe, batches: Batches, device: torch.device) -> None:
        self.network = network.to(device).to(memory_format=torch.channels_last)
        self.recipe = recipe
        self.batches = batches
        self.device = device
        self.total_steps = math.ceil(recipe.epochs * batches.per_epoch)
        self.optimizers = optimizers.build(self.network, recipe, batches.batch_size)
        self.step = 0
        self.seconds = 0.0
        self.history: list[Epoch] = []

    @property
    def finished(self) -> bool:
        return self.step >= self.total_steps

    def state(self) -> checkpoint.State:
        return {
            "recipe": asdict(self.recipe),
            "network": self.network.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "step": self.step,
            "seconds": self.seconds,
            "history": [tuple(epoch) for epoch in self.history],
        }

    def restore(self, state: checkpoint.State) -> None:
        self.network.load_state_dict(state["network"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step, self.seconds = state["step"], state["seconds"]
        self.history = [Epoch(*epoch) for epoch in state["history"]]

    def run_epoch(self, after_step: Any) -> tuple[float, float, float]:
        """One pass, or what is left of it; gives images/s, mean loss and accuracy. Raises Diverged."""
        number, first = divmod(self.step, self.batches.per_epoch)
        last = min(self.batches.per_epoch, first + self.total_steps - self.step)
        loss_sum, hits, count, begun = 0.0, 0, 0, time.monotonic()
        self.network.train()
        with tqdm(total=last - first, desc=f"epoch {number + 1}", unit="batch", leave=False, disable=None) as bar:
            for _, batch in zip(range(first, last), self.batches.epoch(number, first), strict=False):
                step_begun = time.monotonic()
                loss, correct = self._step(batch)
                loss_sum, hits, count = loss_sum + loss, hits + correct, count + len(batch.labels)
                self.seconds += time.monotonic() - step_begun
                rate = count / (time.monotonic() - begun)
                bar.set_postfix_str(f"{rate:.0f} images/s, loss {loss_sum / count:.3f}, accuracy {hits / count:.2%}")
                bar.update()
                after_step()
        return count / (time.monotonic() - begun), loss_sum / count, hits / count

    def _step(self, batch: Split) -> tuple[float, int]:
        """One update; gives the summed loss and the number of right answers."""
        optimizers.schedule(self.optimizers, self.step, self.total_steps, self.batches.per_epoch)
        images = batch.images.to(self.device).permute(0, 3, 1, 2)
        labels = batch.labels.to(self.device)
        with torch.autocast(self.device.type, torch.bfloat16):
            logits = self.network(images)
        loss = F.cross_entropy(logits, labels, label_smoothing=self.recipe.label_smoothing, reduction="sum")
        if not torch.isfinite(loss):
            raise Diverged(f"The loss is {loss.item()} at step {self.step}; a lower learning rate may help.")
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in self.optimizers:
            optimizer.step()
        self.step += 1
        return loss.item(), int((logits.argmax(1) == labels).sum())


def train(trainer: Trainer, holdout: Split, run: Path, checkpoint_s: float) -> None:
    """Runs to the end; writes checkpoints and metrics.jsonl into the run's folder. Raises Diverged or Stopped."""
    file, saved_at, stop = run / "checkpoint.pt", time.monotonic(), _StopRequest()

    def after_step() -> None:
        nonlocal saved_at
        if stop.signal or time.monotonic() - saved_at > checkpoint_s:
            checkpoint.save(file, trainer.state())
            saved_at = time.monotonic()
        if stop.signal:
            raise Stopped(f"Stopped at step {trainer.step} of {trainer.total_steps}; --resume goes on from here.")

    with stop, (run / "metrics.jsonl").open("a") as log:
        while not trainer.finished:
            rate, loss, train_accuracy = trainer.run_epoch(after_step)
            scores = predict.logits(trainer.network, holdout.images)
            accuracy = measures.accuracy(scores, holdout.labels)
            epoch = Epoch(len(trainer.history) + 1, trainer.seconds, rate, loss, train_accuracy, accuracy)
            trainer.history.append(epoch)
            print(json.dumps(epoch._asdict()), file=log, flush=True)
            left = (trainer.total_steps - trainer.step) * trainer.seconds / trainer.step
            print(
                f"epoch {epoch.epoch:3d}  loss {loss:.3f}  train {train_accuracy:.2%}  held out {accuracy:.2%}  "
                f"{rate:.0f} images/s  {trainer.seconds:.0f} s, {left:.0f} s to go",
                flush=True,
            )
            checkpoint.save(file, trainer.state())


class _StopRequest:
    """Turns Ctrl-C and SIGTERM into a flag that is read between steps, where the state is whole."""

    def __init__(self) -> None:
        self.signal = 0

    def __enter__(self) -> None:
        self._before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        self.signal = number


def prepare(recipe: Recipe, split: Split, classes: list[str]) -> tuple[ConvNet, dict[str, Any]]:
    """A network fitted to the statistics of the training images, and the arguments that build it again."""
    torch.manual_seed(recipe.seed)
    arguments: dict[str, Any] = {"classes": len(classes), "widths": recipe.widths, "depth": recipe.depth}
    network = ConvNet(**arguments)
    network.initialize(split.images[:5000])
    return network, arguments


def keep_memory() -> None:
    """Stops glibc from handing large tensors back to the kernel after each use: page faults halve the speed."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        m_mmap_max, m_trim_threshold = -4, -1
        mallopt(m_mmap_max, 0)
        mallopt(m_trim_threshold, -1)


def _generator(*numbers: int) -> torch.Generator:
    """Seeded by several numbers, each below a million."""
    seed = 0
    for number in numbers:
        seed = seed * 1_000_003 + number
    return torch.Generator().manual_seed(seed % 2**63)


def _report_data(dataset: DataSet) -> None:
    print(
        f"{dataset.name}: {len(dataset.train)} training and {len(dataset.test)} test images of "
        f"{len(dataset.classes)} classes"
    )
    for path, reason in dataset.rejected:
        logger.warning("left out %s: %s", path, reason)
    if dataset.rejected:
        print(f"{len(dataset.rejected)} files were left out; their paths are above.")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m training.train", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--data",
        type=Path,
        required=True,
        metavar="DIR",
        help="torchvision's CIFAR-10 folder, or one with train/<class>/* and test/<class>/*",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("weights/model.safetensors"),
        metavar="FILE",
        help="weights file to write [%(default)s]",
    )
    parser.add_argument("--name", help="the model's name on its card [the name of --out]")
    parser.add_argument("--run", type=Path, metavar="DIR", help="folder of checkpoints and logs [runs/<name>]")
    parser.add_argument("--resume", action="store_true", help="go on from the run's last checkpoint")
    parser.add_argument("--download", action="store_true", help="fetch CIFAR-10 into --data first")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps [%(default)s]")
    parser.add_argument(
        "--checkpoint-s",
        type=float,
        default=60.0,
        metavar="X",
        help="seconds between checkpoints, which cost about 0.1 s each [%(default)s]",
    )
    add_flags(parser)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    arguments = parse(argv)
    logging.basicConfig(format="%(message)s")
    try:
        run(arguments)
    except Stopped as stop:
        print(stop)
        sys.exit(130)
    except (ThirtytwoError, OSError) as error:
        sys.exit(f"{type(error).__name__}: {error}")


def run(arguments: argparse.Namespace) -> None:
    keep_memory()
    recipe, name = from_flags(arguments), arguments.name or arguments.out.stem
    folder: Path = arguments.run or Path("runs") / name
    folder.mkdir(parents=True, exist_ok=True)
    saved = checkpoint.load(folder / "checkpoint.pt") if arguments.resume else None
    if saved:
        recipe = Recipe(**saved["recipe"])
    dataset = data.load(arguments.data, recipe.image_size, arguments.download)
    _report_data(dataset)
    split, holdout = data.holdout(dataset.train, recipe.holdout, recipe.seed)
    network, network_arguments = prepare(recipe, split, dataset.classes)
    fill = split.images.view(-1, 3).float().mean(0).round().to(torch.uint8)
    device = pick_device(arguments.device)
    trainer = Trainer(network, recipe, Batches(split, recipe, fill), device)
    if saved:
        trainer.restore(saved)
    train(trainer, holdout, folder, arguments.checkpoint_s)
    card = export.write(
        arguments.out, name, dataset, holdout, trainer.network, network_arguments, recipe, trainer.seconds, str(device)
    )
    print(f"{arguments.out}: test accuracy {card.test_accuracy:.2%}, {card.results['training_s']:.0f} s of training")


if __name__ == "__main__":
    main()
