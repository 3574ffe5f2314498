"""Trains a network on a data folder and writes one weights file.

    python -m training.train --data DIR --out weights/cifar10.safetensors
    torchrun --nproc-per-node=2 -m training.train --data DIR ...

The default recipe and its results are in docs/training.md.
"""

import argparse
import ctypes
import logging
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from app.engines.hardware import resolve_device
from app.engines.pytorch import available_device, load_network
from app.errors import DataError, SettingsError, ThirtytwoError
from app.model import networks, weights
from app.model.networks import ConvNet, unfold_batchnorms
from training import checkpoint, cli, data, export, metrics, private, report
from training.audit import summary
from training.data import Dataset, Split
from training.datasets import selection
from training.distillation import load_teacher
from training.distributed import DistributedContext, init_distributed
from training.loader import Loader
from training.metrics_logger import Epoch
from training.recipe import DEPRECATED_NAMES, Recipe
from training.trainer import Interrupted, Trainer

WHITENING_IMAGES = 5000  # for normalisation and whitening: 12 patch directions need no more
BN_IMAGES = 1000  # for the running means of an unfolded network

logger = logging.getLogger("training")


def run(arguments: argparse.Namespace, device: torch.device, context: DistributedContext) -> None:
    """Recipe, data, network, teacher, training, export, report, in this order."""
    name = arguments.name or arguments.out.stem
    run_dir: Path = arguments.run_dir or Path("runs") / name
    own = context.device(device)
    resumed = checkpoint.load(run_dir / "checkpoint.pt") if arguments.resume else None
    recipe = cli.from_flags(arguments, Recipe.model_validate(resumed["recipe"]) if resumed else None)
    for folder in (run_dir, arguments.out.parent):
        folder.mkdir(parents=True, exist_ok=True)  # an unwritable folder should fail now, not after training
    dataset = _load_data(arguments, recipe.image_size, context)
    train, val = data.training_and_validation(dataset, recipe.val_fraction, recipe.seed)
    network = build_network(recipe, train, len(dataset.classes))
    # The card records the versions of other files, since paths mean nothing on another machine.
    initial = load_pretrained(network, Path(recipe.initial_weights), train.images) if recipe.initial_weights else ""
    teacher = load_teacher(recipe, dataset.classes, train.images, str(own))
    recorded = recipe.model_copy(update={"initial_weights": initial, "teacher": teacher.name if teacher else ""})
    card = export.build_card(name, dataset, recorded, network)
    # On a GPU the images stay in its memory and are augmented there.
    data_device = own if own.type == "cuda" else torch.device("cpu")
    loader = Loader(train, recipe, context.rank, context.world_size, teacher, data_device)
    trainer = Trainer(network, recipe, loader, own, context, "inductor" if arguments.compile else "")
    if resumed:
        trainer.load_state_dict(resumed)
    trainer.fit(val, run_dir, arguments.checkpoint_interval_s, arguments.tensorboard)
    if context.is_main:  # all processes hold the same weights
        final = trainer.final_network()
        _, probabilities = export.export(arguments.out, card, dataset.test, val, final, trainer.seconds, str(own))
        split_name, split = ("test", dataset.test) if len(dataset.test) else ("validation", val)
        title = f"{name}, {split_name} images"
        accuracy = _write_report(run_dir, title, trainer.history, probabilities, split, dataset.classes)
        print(
            f"{arguments.out}: {split_name} accuracy {accuracy:.2%} after {trainer.seconds:.0f} s of training; "
            f"report in {run_dir}/report.md"
        )


def build_network(recipe: Recipe, train: Split, classes: int) -> nn.Module:
    """A randomly initialised network, with normalisation and whitening fitted to the training images."""
    torch.manual_seed(recipe.seed)  # the only use of torch's global generator
    network = networks.build(recipe.arch, recipe.network_arguments(classes))
    if isinstance(network, ConvNet):
        network.initialize(train.images[:WHITENING_IMAGES])
    return network


def load_pretrained(network: nn.Module, file: Path, images: Tensor) -> str:
    """Copies the file's parameters into the network, the head only for the same number of classes.

    `images` are training images uint8 [N, S, S, 3]. Returns name and version of the file. Raises WeightsError, or
    DataError where the networks differ in shape.
    """
    loaded = weights.load(file)
    pretrained = load_network(loaded)
    if not isinstance(network, ConvNet) or not isinstance(pretrained, ConvNet):
        raise DataError("--initial-weights requires --arch convnet.")
    own, others = ([p.shape for p in net.groups.parameters() if p.ndim == 4] for net in (network, pretrained))
    if own != others:  # only filters matter: the normalisations follow from them
        widths, depth = ",".join(map(str, loaded.card.arguments["widths"])), loaded.card.arguments["depth"]
        raise DataError(f"{file} has another shape; it needs --widths {widths} --depth {depth}.")
    unfold_batchnorms(network, pretrained, images[:BN_IMAGES])
    return f"{loaded.card.name} {loaded.version}"


def disable_malloc_trim() -> None:
    """Keeps freed memory in the process on glibc: page faults of large tensors otherwise halve the speed."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        m_mmap_max, m_trim_threshold = -4, -1  # from malloc.h
        mallopt(m_mmap_max, 0)  # large blocks come from the heap, too
        mallopt(m_trim_threshold, -1)  # the heap never shrinks


def _load_data(arguments: argparse.Namespace, size: int, context: DistributedContext) -> Dataset:
    if arguments.download and context.is_main:
        data.download(arguments.data, arguments.dataset or "cifar10")
    context.all_reduce_sum(0)  # a barrier: the other processes wait for the download
    splits = ["train"] if arguments.no_test else data.SPLITS
    dataset = data.load(arguments.data, size, splits, selection.from_flags(arguments))
    if context.is_main:
        report_files(dataset)
    return dataset


def report_files(dataset: Dataset) -> None:
    """Prints what was read, and logs what was rejected or is suspicious."""
    print(
        f"{dataset.name}: {len(dataset.train)} training and {len(dataset.test)} test images of "
        f"{len(dataset.classes)} classes"
    )
    for line in (*dataset.notes, *summary.lines(dataset)):
        print(line)
    if dataset.dark_16_bit:
        logger.warning(
            "%d files of 16 bits a channel use the lowest 12 bits only and are nearly black, such as %s; "
            "multiply their values by 16",
            len(dataset.dark_16_bit),
            dataset.dark_16_bit[0],
        )


def _write_report(
    folder: Path, title: str, history: list[Epoch], probabilities: Tensor, split: Split, classes: list[str]
) -> float:
    """Writes the report on one split's images; returns the accuracy."""
    results = metrics.classification_metrics(probabilities, split.labels, classes)
    mistakes = report.top_losses(split.images, probabilities, split.labels, classes)
    report.write_run(folder, title, [epoch._asdict() for epoch in history], results, mistakes)
    return float(results["accuracy"])


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = cli.Parser(
        prog="python -m training.train",
        usage="python -m training.train --data DIR [--out FILE] [options]",
        description=(__doc__ or "").splitlines()[0],
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--out", type=Path, default=Path("weights/model.safetensors"), metavar="FILE",
        help="weights file to write [%(default)s]")  # fmt: skip
    add("--name", help="name on the model card [stem of --out]")
    add("--run-dir", type=Path, metavar="DIR", help="folder for checkpoints, logs and report [runs/<name>]")
    add("--resume", action="store_true", help="continue from the last checkpoint; other flags change its recipe")
    add("--no-test", action="store_true", help="do not read the test images, to choose a recipe without them")
    add("--download", action="store_true", help="download --dataset, or else CIFAR-10, into --data first")
    add("--device", default="auto", help="auto, cpu, cuda or mps [%(default)s]")
    add("--compile", action="store_true",
        help="compile the network with torch.compile: minutes at the start, then faster steps")  # fmt: skip
    add("--checkpoint-interval-s", type=float, default=60.0, metavar="FLOAT",
        help="seconds between checkpoints; one takes about 0.1 s [%(default)s]")  # fmt: skip
    add("--tensorboard", action="store_true", help="also write TensorBoard events into --run-dir")
    selection.add_flags(parser)
    private.add_flags(parser)
    cli.add_flags(parser)
    deprecated = {**DEPRECATED_NAMES, "skip_test": "no_test", "checkpoint_s": "checkpoint_interval_s"}
    return parser.parse_args(cli.replace_deprecated(sys.argv[1:] if argv is None else argv, deprecated))


def main(argv: list[str] | None = None) -> None:
    logging.basicConfig(format="%(message)s")
    arguments = parse(argv)
    disable_malloc_trim()
    try:
        if arguments.dp_epsilon is not None:
            private.run(arguments)
            return
        device = available_device(resolve_device(arguments.device))
        with init_distributed(device) as context:
            run(arguments, device, context)
    except Interrupted as interrupted:
        print(interrupted)
        sys.exit(130)  # 128 + SIGINT, as shells report it
    except SettingsError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except (ThirtytwoError, OSError) as error:
        sys.exit(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
