"""Trains a network on a data folder and writes one weights file.

    python -m training.train --data DIR --out weights/cifar10.safetensors
    torchrun --nproc-per-node=2 -m training.train --data DIR ...

docs/training.md is the guide, docs/model-card.md has the recipe of the bundled model.
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
from app.errors import DataError
from app.model import networks
from app.model.networks import ConvNet, unfold_batchnorms
from training import checkpoint, cli, data, export, finetune, metrics, outputs, private, selection
from training.data import Dataset, Split
from training.datasets import selection as data_selection
from training.distillation import load_teacher
from training.distributed import DistributedContext, init_distributed
from training.features import load_backbone
from training.linear_head import LinearHead
from training.loader import Loader
from training.plan import Choice, Plan
from training.recipe import DEPRECATED_NAMES, Recipe
from training.selection import Validation
from training.trainer import Interrupted, Trainer

WHITENING_IMAGES = 5000  # for normalisation and whitening: 12 patch directions need no more
BN_IMAGES = 1000  # for the running means of an unfolded network


def run(arguments: argparse.Namespace, device: torch.device, context: DistributedContext) -> None:
    """Checks the names, then trains; folders that a failed start leaves empty are removed."""
    name = arguments.name or arguments.out.stem
    run_dir: Path = arguments.run_dir or Path("runs") / name
    resumed = checkpoint.load(run_dir / "checkpoint.pt") if arguments.resume else None
    recipe = cli.from_flags(arguments, Recipe.model_validate(resumed["recipe"]) if resumed else None)
    outputs.check_names(name, initial_weights=recipe.initial_weights, teacher=recipe.teacher)
    if not resumed:
        recipe = selection.prepared(recipe, cli.given(arguments), context.world_size)
    if context.is_main and not (resumed or arguments.overwrite):
        outputs.refuse_used_names(arguments.out, run_dir)
    with outputs.new_folders(run_dir, arguments.out.parent):  # an unwritable folder should fail now, not after training
        dataset, own_mask = data.with_validation(_load_data(arguments, recipe.image_size, context))
        settled = Recipe.model_fields if resumed else cli.given(arguments)
        held_out = selection.validation(recipe, settled, dataset.train, own_mask)
        if resumed:
            checkpoint.check_fingerprint(resumed, data.fingerprint(dataset))
            plan = selection.resumed(recipe, cli.given(arguments), resumed.get("plan", {}))
        else:
            classes = len(dataset.classes)
            plan = selection.choose(recipe, settled, dataset.train, classes, held_out, context.world_size)
            if context.is_main:
                print(*plan.choices, sep="\n")
                # With --overwrite: a later --resume must not continue the former run.
                (run_dir / "checkpoint.pt").unlink(missing_ok=True)
        output = outputs.Output(name, arguments.out, run_dir, no_test=not len(dataset.test))
        if plan.recipe.finetune == "head" and plan.head is not None:
            outputs.write_head(output, dataset, plan, held_out, str(device))
        else:
            _train_network(arguments, output, dataset, held_out, plan, resumed, context.device(device), context)


def _train_network(
    arguments: argparse.Namespace,
    output: outputs.Output,
    dataset: Dataset,
    held_out: Validation,
    plan: Plan,
    resumed: checkpoint.State | None,
    device: torch.device,
    context: DistributedContext,
) -> None:
    """Network, teacher, training and export, in this order."""
    recipe = plan.recipe
    train, val = dataset.train.select(~held_out.mask), dataset.train.select(held_out.mask)
    network = build_network(recipe, train, len(dataset.classes))
    # The card records the versions of other files, since paths mean nothing on another machine.
    initial = ""
    if recipe.initial_weights:
        same = plan.backbone is not None and plan.backbone.card.classes == dataset.classes
        sample = train.sample(BN_IMAGES, recipe.seed).images
        initial = load_pretrained(network, Path(recipe.initial_weights), sample, None if same else plan.head)
    teacher = load_teacher(recipe, dataset.classes, train.images, str(device))
    recorded = recipe.model_copy(update={"initial_weights": initial, "teacher": teacher.name if teacher else ""})
    card = export.build_card(output.name, dataset, recorded, network)
    # On a GPU the images stay in its memory and are augmented there.
    data_device = device if device.type == "cuda" else torch.device("cpu")
    loader = Loader(train, recipe, context.rank, context.world_size, teacher, data_device, len(dataset.classes))
    trainer = Trainer(network, recipe, loader, device, context, "inductor" if arguments.compile else "")
    trainer.fingerprint, trainer.plan = data.fingerprint(dataset), plan.state_dict()
    if resumed:
        trainer.load_state_dict(resumed)
    trainer.fit(val, output.run_dir, arguments.checkpoint_interval_s, arguments.tensorboard)
    if not context.is_main:  # all processes hold the same weights
        return
    final = trainer.final_network()
    if plan.trial and plan.head is not None and plan.backbone is not None:
        head_logits = finetune.start_logits(plan.backbone, plan.head, val.images)
        better, reason = finetune.wins(metrics.predict_logits(final, val.images), head_logits, val, plan.head)
        print(Choice("finetune", "all" if better else "head", reason))
        if not better:
            head_plan = plan._replace(recipe=recipe.model_copy(update={"finetune": "head"}))
            outputs.write_head(output, dataset, head_plan, held_out, str(device))
            return
    _, probabilities = export.export(output.file, card, dataset.test, val, final, trainer.seconds, str(device), train)
    name, split = ("validation", val) if output.no_test else ("test", dataset.test)
    outputs.write_report(output, name, trainer.history, probabilities, split, dataset, plan)


def build_network(recipe: Recipe, train: Split, classes: int) -> nn.Module:
    """A randomly initialised network, with normalisation and whitening fitted to the training images."""
    torch.manual_seed(recipe.seed)  # the only use of torch's global generator
    network = networks.build(recipe.arch, recipe.network_arguments(classes))
    if isinstance(network, ConvNet):
        network.initialize(train.sample(WHITENING_IMAGES, recipe.seed).images)
    return network


def load_pretrained(network: nn.Module, file: Path, images: Tensor, head: LinearHead | None = None) -> str:
    """Copies the file's parameters into the network; the head, too, for the same number of classes or from `head`.

    `head` starts the network with the weights that were fitted without validation images.
    `images` are training images uint8 [N, S, S, 3]. Returns name and version of the file. Raises WeightsError, or
    DataError where the networks differ in shape.
    """
    if not isinstance(network, ConvNet):
        raise DataError("--initial-weights requires --arch convnet.")
    loaded = load_backbone(file)
    pretrained = load_network(loaded)
    assert isinstance(pretrained, ConvNet)
    own, others = ([p.shape for p in net.groups.parameters() if p.ndim == 4] for net in (network, pretrained))
    if own != others:  # only filters matter: the normalisations follow from them
        widths, depth = ",".join(map(str, loaded.card.arguments["widths"])), loaded.card.arguments["depth"]
        raise DataError(f"{file} has another shape; it needs --widths {widths} --depth {depth}.")
    unfold_batchnorms(network, pretrained, images)
    if head is not None:  # from a random head, the first steps distort the features (Kumar et al. 2022)
        with torch.no_grad():
            network.head.weight.copy_(torch.from_numpy(head.start_weight) * network.head.in_features)
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
    unread = ["test"] if arguments.unread_test else []
    dataset = data.load(arguments.data, size, splits, data_selection.from_flags(arguments), unread)
    if context.is_main:
        outputs.report_files(dataset)
    return dataset


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
    add("--overwrite", action="store_true", help="replace the files of an earlier run of this name")
    add("--no-test", action="store_true", help="do not read the test images, to choose a recipe without them")
    add("--unread-test", action="store_true",
        help="hold the test images out, but do not read them: for training.cascade, which does")  # fmt: skip
    add("--download", action="store_true", help="download --dataset, or else CIFAR-10, into --data first")
    add("--device", default="auto", help="auto, cpu, cuda or mps [%(default)s]")
    add("--compile", action="store_true",
        help="compile the network with torch.compile: minutes at the start, then faster steps")  # fmt: skip
    add("--checkpoint-interval-s", type=float, default=private.DEFAULTS["checkpoint_interval_s"], metavar="FLOAT",
        help="seconds between checkpoints; one takes about 0.1 s [%(default)s]")  # fmt: skip
    add("--tensorboard", action="store_true", help="also write TensorBoard events into --run-dir")
    data_selection.add_flags(parser)
    private.add_flags(parser)
    cli.add_flags(parser)
    deprecated = {**DEPRECATED_NAMES, "skip_test": "no_test", "checkpoint_s": "checkpoint_interval_s"}
    return parser.parse_args(cli.replace_deprecated(sys.argv[1:] if argv is None else argv, deprecated))


def main(argv: list[str] | None = None) -> None:
    logging.basicConfig(format="%(message)s")
    arguments = parse(argv)
    disable_malloc_trim()
    with cli.errors_in_one_line():
        if arguments.dp_epsilon is not None:
            private.run(arguments)
        else:
            _run_on_device(arguments)


def _run_on_device(arguments: argparse.Namespace) -> None:
    device = available_device(resolve_device(arguments.device))
    try:
        with init_distributed(device) as context:
            run(arguments, device, context)
    except Interrupted as interrupted:
        print(interrupted)
        sys.exit(130)  # 128 + SIGINT, as shells report it


if __name__ == "__main__":
    main()
