"""The public recipe for 94 % (Jordan 2024, arXiv 2404.00498) as one would port it to a CPU: our trainer without what it
adds for speed, to compare times to an accuracy on one machine.

    python -m benchmarks.airbench_baseline --data DIR
"""

import argparse
from pathlib import Path

import torch

from app.model import networks
from training import data
from training.distributed import Ranks
from training.loader import Batches
from training.recipe import Recipe
from training.train import prepare
from training.trainer import Trainer, train

RECIPE = Recipe(
    widths=(64, 256, 256),
    depth=2,
    epochs=8,
    batch_size=2000,
    holdout=0.05,
    filter_lr=0.24,
    label_smoothing=0.2,
    translate=2,
    cutout=0,
)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.airbench_baseline", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="CIFAR-10 folder")
    parser.add_argument("--run-dir", type=Path, default=Path("runs/port"), metavar="DIR", help="[%(default)s]")
    arguments = parser.parse_args()
    networks.IM2COL_MAX_PIXELS = 0  # every convolution runs in oneDNN, as in a plain port
    dataset = data.load(arguments.data, RECIPE.image_size, ["train"])
    split, holdout = data.holdout(dataset.train, RECIPE.holdout, RECIPE.seed)
    network = prepare(RECIPE, split, len(dataset.classes))
    ranks = Ranks()
    arguments.run_dir.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(network, RECIPE, Batches(split, RECIPE, ranks.rank, ranks.world), torch.device("cpu"), ranks)
    train(trainer, holdout, arguments.run_dir, checkpoint_s=3600)


if __name__ == "__main__":
    main()
