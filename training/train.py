"""Trains a network on a data folder and writes one weights file.

    python -m training.train --data DIR --out weights/cifar10.safetensors
    torchrun --nproc-per-node=2 -m training.train --data DIR ...

The default recipe and the figures it reached are in docs/training.md.
"""

import argparse
import ctypes
import logging
import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from app.engines.hardware import resolve_device
from app.engines.pytorch import available_device, load_network
from app.errors import DataError, ThirtytwoError
from app.model import networks, weights
from app.model.networks import ConvNet, unfold_batchnorms
from training import checkpoint, data, distributed, export, report
from training.data import DataSet, Split
from training.distillation import engage
from training.distributed import Ranks
from training.loader import Batches
from training.recipe import Recipe, add_flags, from_flags
from training.trainer import Epoch, Stopped, Trainer, train

logger = logging.getLogger("training")

SAMPLE = 1000  # images that the normalisation's share of a folded bias is measured on


def prepare(recipe: Recipe, split: Split, classes: int) -> nn.Module:
    """A network as the recipe describes it, fitted to the statistics of the training images."""
    torch.manual_seed(recipe.seed)
    network = networks.build(recipe.arch, recipe.network_arguments(classes))
    if isinstance(network, ConvNet):
        network.initialize(split.images[:5000])
    return network


def begin(network: nn.Module, file: Path, images: Tensor) -> str:
    """Gives the network the file's filters, and its head where the number of classes is the same; names the file.

    Images uint8 [N, S, S, 3] are the training ones. Raises DataError or WeightsError.
    """
    loaded = weights.load(file)
    found = load_network(loaded)
    if not isinstance(network, ConvNet) or not isinstance(found, ConvNet):
        raise DataError("Only a convnet can begin with another file's network.")
    own, others = ([p.shape for p in net.groups.parameters() if p.ndim == 4] for net in (network, found))
    if own != others:
        widths, depth = ",".join(map(str, loaded.card.arguments["widths"])), loaded.card.arguments["depth"]
        raise DataError(f"{file} has another shape: it asks for --widths {widths} --depth {depth}.")
    unfold_batchnorms(network, found, images[:SAMPLE])
    return f"{loaded.card.name} {loaded.version}"


def _report(
    folder: Path, title: str, history: list[Epoch], probabilities: Tensor, split: Split, classes: list[str]
) -> float:
    """Writes the run's report over one split's images; gives the accuracy on them."""
    figures = report.measure(probabilities, split.labels, classes)
    worst = report.worst_mistakes(split.images, probabilities, split.labels, classes)
    report.write_run(folder, title, [epoch._asdict() for epoch in history], figures, worst)
    return float(figures["accuracy"])


def keep_memory() -> None:
    """Stops glibc from handing large tensors back to the kernel after each use: page faults halve the speed."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        m_mmap_max, m_trim_threshold = -4, -1
        mallopt(m_mmap_max, 0)
        mallopt(m_trim_threshold, -1)


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
    parser = argparse.ArgumentParser(prog="python -m training.train", description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add(
        "--data",
        type=Path,
        required=True,
        metavar="DIR",
        help="torchvision's CIFAR-10 folder, or one with train/<class>/* and test/<class>/*",
    )
    add(
        "--out",
        type=Path,
        default=Path("weights/model.safetensors"),
        metavar="FILE",
        help="weights file to write [%(default)s]",
    )
    add("--name", help="the model's name on its card [the name of --out]")
    add("--run-dir", type=Path, metavar="DIR", help="folder of checkpoints and logs [runs/<name>]")
    add("--resume", action="store_true", help="go on from the last checkpoint; flags change the recipe from there on")
    add("--skip-test", action="store_true", help="leave the test images unread, to choose a recipe without them")
    add("--download", action="store_true", help="fetch CIFAR-10 into --data first")
    add("--device", default="auto", help="auto, cpu, cuda or mps [%(default)s]")
    add("--checkpoint-s", type=float, default=60.0, metavar="X",
        help="seconds between checkpoints, which cost about 0.1 s each [%(default)s]")  # fmt: skip
    add("--tensorboard", action="store_true", help="write TensorBoard's events into the run's folder, too")
    add_flags(parser)
    return parser.parse_args(argv)


def run(arguments: argparse.Namespace, ranks: Ranks) -> None:
    name = arguments.name or arguments.out.stem
    folder: Path = arguments.run_dir or Path("runs") / name
    saved = checkpoint.load(folder / "checkpoint.pt") if arguments.resume else None
    recipe = from_flags(arguments, Recipe(**saved["recipe"]) if saved else None)
    for needed in (folder, arguments.out.parent):  # what cannot be written to is better known now than at the end
        needed.mkdir(parents=True, exist_ok=True)
    if arguments.download and ranks.first:
        data.download(arguments.data)
    ranks.total(0)  # the others wait for it
    dataset = data.load(arguments.data, recipe.image_size, ["train"] if arguments.skip_test else data.PARTS)
    if ranks.first:
        _report_data(dataset)
    split, holdout = data.holdout(dataset.train, recipe.holdout, recipe.seed)
    network = prepare(recipe, split, len(dataset.classes))
    begun = begin(network, Path(recipe.initial_weights), split.images) if recipe.initial_weights else ""
    teacher = engage(recipe, dataset.classes, split.images)
    shown = replace(recipe, initial_weights=begun, teacher=teacher.name if teacher else "")
    card = export.describe(name, dataset, shown, network)
    batches = Batches(split, recipe, ranks.rank, ranks.world, teacher)
    trainer = Trainer(network, recipe, batches, ranks.device(available_device(resolve_device(arguments.device))), ranks)
    if saved:
        trainer.restore(saved)
    train(trainer, holdout, folder, arguments.checkpoint_s, arguments.tensorboard)
    if ranks.first:
        seconds = trainer.seconds
        _, answers = export.write(arguments.out, card, dataset.test, holdout, trainer.result(), seconds)
        where, split = ("held-out", holdout) if arguments.skip_test else ("test", dataset.test)
        accuracy = _report(folder, f"{name}, {where} images", trainer.history, answers, split, dataset.classes)
        print(f"{arguments.out}: {where} accuracy {accuracy:.2%} after {seconds:.0f} s; {folder}/report.md tells more")


def main(argv: list[str] | None = None) -> None:
    arguments = parse(argv)
    logging.basicConfig(format="%(message)s")
    keep_memory()
    try:
        with distributed.join(available_device(resolve_device(arguments.device))) as ranks:
            run(arguments, ranks)
    except Stopped as stop:
        print(stop)
        sys.exit(130)
    except (ThirtytwoError, OSError) as error:
        sys.exit(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
