"""The public recipe for 94 % (Jordan 2024, arXiv 2404.00498), ported to a CPU without this project's optimisations.

It compares the time to an accuracy on one machine.

    python -m benchmarks.airbench_baseline --data DIR
"""

import argparse
from pathlib import Path

import torch

from app.model import networks
from training import data
from training.loader import Loader
from training.recipe import Recipe
from training.train import build_network
from training.trainer import Trainer

RECIPE = Recipe(
    widths=(64, 256, 256),
    depth=2,
    epochs=8,
    batch_size=2000,
    val_fraction=0.05,
    muon_lr=0.24,
    label_smoothing=0.2,
    random_crop_padding=2,
    cutout=0,
)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.airbench_baseline", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="CIFAR-10 folder")
    parser.add_argument("--run-dir", type=Path, default=Path("runs/airbench"), metavar="DIR", help="[%(default)s]")
    arguments = parser.parse_args()
    networks.IM2COL_MAX_PIXELS = 0  # all convolutions in oneDNN; disable_malloc_trim is not called either
    dataset = data.load(arguments.data, RECIPE.image_size, ["train"])
    train, val = data.train_val_split(dataset.train, RECIPE.val_fraction, RECIPE.seed)
    network = build_network(RECIPE, train, len(dataset.classes))
    arguments.run_dir.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(network, RECIPE, Loader(train, RECIPE), torch.device("cpu"))
    trainer.fit(val, arguments.run_dir, checkpoint_interval_s=3600)


if __name__ == "__main__":
    main()
