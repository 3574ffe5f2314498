"""Differentially private training of a linear head on frozen features: DP-SGD (Abadi et al. 2016, arXiv 1607.00133).

Opacus clips the gradient of each image, adds Gaussian noise, and accounts for the privacy loss. Few weights on good
features lose little accuracy to the noise (Tramer & Boneh 2021, arXiv 2011.11660). Nothing else in the weights file
depends on the training images: filters, int8 ranges, scale and reference images are those of the starting file, the
temperature is 1. docs/private-training.md has the limits.
"""

import argparse
import json
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from app import engines
from app.errors import DataError, SettingsError
from app.model import weights as weights_file
from app.model.weights import BUNDLED, Weights
from training import calibration, data, metrics, outputs
from training.data import Dataset
from training.datasets import selection
from training.export import model_card, split_results
from training.features import extract_features, load_backbone
from training.recipe import Recipe

Array = NDArray[np.float32]

# Chosen on public images (docs/private-training.md): a choice on the private ones would cost privacy.
STEPS = 30  # full-batch gradient steps
LEARNING_RATE = 2.0
MAX_GRAD_NORM = 1.0  # the features have a norm of about 1
MAX_DELTA = 1e-5
PHYSICAL_BATCH = 1024  # images whose gradients are in memory at once
ACCOUNTANT = "rdp"  # an upper bound; docs/private-training.md compares it with the exact value

# Flags of `training.train` without effect, and their defaults.
DEFAULTS = {
    "resume": False,
    "unread_test": False,
    "compile": False,
    "tensorboard": False,
    "checkpoint_interval_s": 60.0,
}
USED_FIELDS = {"initial_weights"}  # of the recipe; the others do not apply

NO_OPACUS = "--dp-epsilon needs Opacus; it is the extra 'private': pip install '.[private]'."


class Budget(NamedTuple):
    """(epsilon, delta) of the training, and the noise in multiples of MAX_GRAD_NORM that reaches it in STEPS steps."""

    epsilon: float
    delta: float
    noise_multiplier: float


def add_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("differential privacy")
    group.add_argument("--dp-epsilon", type=_positive, metavar="FLOAT",
        help="train the head on frozen features with this privacy loss; 1 is strong, 8 weak [not private]")  # fmt: skip
    group.add_argument("--dp-delta", type=_positive, metavar="FLOAT",
        help="probability that the bound does not hold [a tenth of 1 / images, at most 1e-5]")  # fmt: skip


def run(arguments: argparse.Namespace) -> None:
    """Features, head, weights file, report. Raises SettingsError, DataError or OSError."""
    _check(arguments)
    name = arguments.name or arguments.out.stem
    outputs.check_names(name, initial_weights=arguments.initial_weights or "")
    run_dir: Path = arguments.run_dir or Path("runs") / name
    if not arguments.overwrite:
        outputs.refuse_used_names(arguments.out, run_dir)
    with outputs.new_folders(run_dir, arguments.out.parent):
        _train(arguments, name, run_dir)


def _train(arguments: argparse.Namespace, name: str, run_dir: Path) -> None:
    start = Path(arguments.initial_weights or BUNDLED)
    backbone = load_backbone(start)
    if arguments.download:
        data.download(arguments.data, arguments.dataset or "cifar10")
    splits = ["train"] if arguments.no_test else data.SPLITS
    dataset = data.load(arguments.data, backbone.card.input_size, splits, selection.from_flags(arguments))
    outputs.report_files(dataset)
    budget = plan(arguments.dp_epsilon, arguments.dp_delta, len(dataset.train))
    public = extract_features(start, torch.from_numpy(backbone.reference_images))
    features = extract_features(start, dataset.train.images)
    head = train_head(features, dataset.train.labels, len(dataset.classes), public, budget)
    weights = build_weights(name, backbone, dataset, head, budget)
    print(
        f"head of {len(dataset.classes)} classes on {len(dataset.train)} images, epsilon {budget.epsilon:.2f}, "
        f"delta {budget.delta:.1e}, noise multiplier {budget.noise_multiplier:.2f}"
    )
    _finish(arguments, run_dir, weights, dataset)


def plan(epsilon: float, delta: float | None, images: int) -> Budget:
    """The noise for a training of STEPS steps on all images; raises SettingsError for an impossible request."""
    accountants = _opacus().accountants
    delta = min(MAX_DELTA, 0.1 / images) if delta is None else delta
    if delta >= 1 / images:
        raise SettingsError(f"--dp-delta {delta:g} is not below 1 / {images} images; such a bound has no meaning.")
    with _quiet():
        try:
            noise = accountants.utils.get_noise_multiplier(
                target_epsilon=epsilon, target_delta=delta, sample_rate=1.0, steps=STEPS, accountant=ACCOUNTANT
            )
        except ValueError as error:
            raise SettingsError(f"--dp-epsilon {epsilon:g} cannot be reached: {error}") from error
        return Budget(spent(noise, STEPS, delta), delta, float(noise))


def spent(noise_multiplier: float, steps: int, delta: float, sample_rate: float = 1.0) -> float:
    """Epsilon after so many steps, from the accountant."""
    accountant = _opacus().accountants.create_accountant(ACCOUNTANT)
    accountant.history = [(noise_multiplier, sample_rate, steps)]
    with _quiet():
        return float(accountant.get_epsilon(delta))


def train_head(features: Array, labels: Tensor, classes: int, public: Array, budget: Budget) -> Tensor:
    """Head weights float32 [classes, D] that give logits for features [N, D] of labels int64 [N].

    `public` [R, D] are features of images that are not private. They define a linear map: it removes their mean
    direction, which all images share, and scales. The map becomes a part of the head.
    """
    projection, scale = public_map(torch.from_numpy(public))
    inputs = torch.from_numpy(features) @ projection / scale
    head = nn.Linear(inputs.shape[1], classes, bias=False)
    nn.init.zeros_(head.weight)
    _fit(head, TensorDataset(inputs, labels), budget)
    return head.weight.detach() @ projection / scale


def public_map(public: Tensor) -> tuple[Tensor, Tensor]:
    """(projection [D, D], scale): without the direction of the mean, the public features have a median norm of 1."""
    direction = F.normalize(public.mean(0), dim=0)
    projection = torch.eye(len(direction)) - torch.outer(direction, direction)
    return projection, (public @ projection).norm(dim=1).median()


def _fit(head: nn.Linear, dataset: TensorDataset, budget: Budget) -> None:
    """Full-batch DP-SGD. Every image takes part in every step, so the accountant's sample rate is 1."""
    opacus = _opacus()
    noise = torch.Generator()
    noise.seed()  # from the system: the noise could be subtracted by anyone with the seed of a run
    with _quiet():
        engine = opacus.PrivacyEngine(accountant=ACCOUNTANT)
        module, optimizer, loader = engine.make_private(
            module=head,
            optimizer=torch.optim.SGD(head.parameters(), lr=LEARNING_RATE),
            data_loader=DataLoader(dataset, batch_size=len(dataset)),
            noise_multiplier=budget.noise_multiplier,
            max_grad_norm=MAX_GRAD_NORM,
            noise_generator=noise,
        )
        for _ in range(STEPS):
            with opacus.utils.batch_memory_manager.BatchMemoryManager(
                data_loader=loader, max_physical_batch_size=PHYSICAL_BATCH, optimizer=optimizer
            ) as batches:
                for inputs, labels in batches:
                    optimizer.zero_grad()
                    F.cross_entropy(module(inputs), labels).backward()
                    optimizer.step()
        used = engine.get_epsilon(budget.delta)
    if used > budget.epsilon * 1.001:  # a change of Opacus must not pass in silence
        raise DataError(f"The training has used epsilon {used:.3f} instead of {budget.epsilon:.3f}.")


def build_weights(name: str, backbone: Weights, dataset: Dataset, head: Tensor, budget: Budget) -> Weights:
    """The backbone with the new head; raises SettingsError for an invalid name or class."""
    width = head.shape[1]
    state = {**backbone.state, "head.weight": (head * width).half().numpy()}  # the network divides logits by its width
    old = backbone.card
    recipe = {
        "initial_weights": f"{old.name} {backbone.version}",
        "dp_epsilon": round(budget.epsilon, 4),
        "dp_delta": budget.delta,
        "dp_noise_multiplier": round(budget.noise_multiplier, 4),
        "dp_max_grad_norm": MAX_GRAD_NORM,
        "dp_accountant": ACCOUNTANT,
        "steps": STEPS,
        "batch_size": len(dataset.train),
        **dataset.test_part(),
    }
    card = model_card(
        name=name,
        classes=dataset.classes,
        input_size=old.input_size,
        architecture=old.architecture,
        arguments={**old.arguments, "classes": len(dataset.classes)},
        parameters=old.parameters + (len(dataset.classes) - len(old.classes)) * width,
        forward_gflops=old.forward_gflops,
        temperature=1.0,
        activation_ranges=old.activation_ranges,
        test_accuracy=None,
        dataset=dataset.name,
        recipe=recipe,
    )
    weights = backbone._replace(card=card, state=state, sha256="", reference_stages=None)
    return weights._replace(reference_probabilities=calibration.reference_outputs(weights))


def _finish(arguments: argparse.Namespace, run_dir: Path, weights: Weights, dataset: Dataset) -> None:
    """Writes the file, and a report on held-out images where there are any."""
    split_name, split = ("test", dataset.test) if len(dataset.test) else ("val", dataset.val)
    if split:
        probabilities = metrics.predict(engines.load(weights, arguments.device), split.images)
        results = split_results(split_name, probabilities, split.labels)
        accuracy = round(metrics.accuracy(probabilities, split.labels), 6) if split_name == "test" else None
        weights = weights._replace(card=weights.card.model_copy(update={"results": results, "test_accuracy": accuracy}))
        name = weights.card.name
        outputs.write_metrics(run_dir, f"{name}, {split_name} images", split, probabilities, weights.card.classes)
        print(f"{split_name} accuracy {results[f'{split_name}_accuracy']:.2%}; report in {run_dir}/report.md")
    weights_file.save(
        arguments.out, weights.card, weights.state, weights.reference_images, weights.reference_probabilities
    )
    print(f"{arguments.out}: {json.dumps({k: v for k, v in weights.card.recipe.items() if k.startswith('dp_')})}")


def _check(arguments: argparse.Namespace) -> None:
    """Raises SettingsError for flags that private training does not use: no flag is ignored in silence."""
    given = [name for name in Recipe.model_fields if getattr(arguments, name, None) is not None]
    unused = [f"--{name.replace('_', '-')}" for name in given if name not in USED_FIELDS]
    changed = [name for name, default in DEFAULTS.items() if getattr(arguments, name) != default]
    unused += [f"--{name.replace('_', '-')}" for name in changed]
    if unused:
        raise SettingsError(f"--dp-epsilon trains a head only, without {', '.join(unused)}.")


def _positive(text: str) -> float:
    if not float(text) > 0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return float(text)


def _opacus() -> Any:
    """The library, imported on use: it is an extra. Raises SettingsError where it is missing."""
    try:
        with _quiet():
            import opacus
            import opacus.accountants.utils
            import opacus.utils.batch_memory_manager
    except ImportError as error:
        raise SettingsError(NO_OPACUS) from error
    return opacus


def _quiet() -> "warnings.catch_warnings[None]":
    """Without Opacus' warnings: on its secure generator, on orders at the edge of its range, and on hooks."""
    return warnings.catch_warnings(action="ignore")
