"""Composes trained networks into a cascade and writes its weights file.

    python -m training.cascade small.safetensors large.safetensors --stage 0 --stage 1 --stage 1:flip:2 \\
        --data DIR --out weights/cascade.safetensors

A stage is NETWORK, an index into the files, then optionally `:flip` for the horizontal flip of the image and `:K` for
the mean log-probabilities of the last K stages. Calibrations and thresholds are fitted to validation images that no
network was trained on: the files must have been trained with one --seed and one --val-fraction.
"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from app import engines
from app.engines import CascadeEngine, Output
from app.engines.cascade import PROBABILITY_FLOOR
from app.engines.pytorch import load_network
from app.errors import DataError
from app.model import weights as weights_file
from app.model.card import ModelCard, Stage, check_references
from app.model.weights import Weights, cascade_state, save
from training import calibration, cli, data, metrics, provenance
from training.baseline import with_baseline
from training.data import HELD_OUT, Dataset, Split
from training.datasets import selection
from training.datasets.listing import shortened
from training.exits import MAX_LOSS, Array, averages, fit_exits, probabilities_of, reaching
from training.export import reference_images, split_results
from training.ood import with_ood, without_ood


def parse_stage(text: str) -> Stage:
    """`1`, `1:flip` or `1:flip:2`; raises ValueError."""
    network, *options = text.split(":")
    averaged = [int(option) for option in options if option != "flip"]
    return Stage(network=int(network), hflip="flip" in options, average_last=averaged[0] if averaged else 1)


def compose(
    networks: Sequence[Weights],
    stages: Sequence[Stage],
    name: str,
    val: Split,
    max_loss: float = MAX_LOSS,
    runs: Sequence[dict[str, Any]] = (),
    device: str = "auto",
) -> Weights:
    """The cascade with calibrations and thresholds fitted to `val`, clean and as JPEG; without test results.

    `runs` are recorded on the card. Raises DataError for networks that differ in classes or input size.
    """
    first = networks[0].card
    if any(each.card.classes != first.classes or each.card.input_size != first.input_size for each in networks):
        raise DataError("The networks of a cascade need the same classes and input size.")
    clean, lossy = (
        stage_outputs(networks, stages, images, device) for images in (val.images, calibration.as_jpeg(val.images))
    )
    costs = [networks[stage.network].card.forward_gflops or 0.0 for stage in stages]
    fitted = fit_exits(stages, np.concatenate([clean, lossy], 1), val.labels.repeat(2).numpy(), costs, max_loss)
    shares = reaching(fitted, clean).mean(1)
    fitted = [
        stage.model_copy(update={"share": round(float(share), 4)}) for stage, share in zip(fitted, shares, strict=True)
    ]
    references = reference_images(val)
    outputs = reference_outputs(networks, fitted, references)
    card = ModelCard(
        name=name,
        classes=first.classes,
        input_size=first.input_size,
        architecture="cascade",
        arguments={},
        parameters=sum(each.card.parameters for each in networks),
        forward_gflops=_mean_cost(shares, costs) or None,
        temperature=1.0,
        networks=[each.card for each in networks],
        stages=fitted,
        test_accuracy=None,
        dataset=first.dataset,
        recipe=recipe_of(stages, max_loss, runs),
    )
    return Weights(card, cascade_state(networks), references, outputs[-1], "", outputs)


def recipe_of(stages: Sequence[Stage], max_loss: float, runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What the card records as the recipe of a cascade."""
    return {
        "stages": [stage.model_dump(include={"network", "hflip", "average_last"}) for stage in stages],
        "max_loss": max_loss,
        "runs": list(runs),
    }


def stage_outputs(
    networks: Sequence[Weights], stages: Sequence[Stage], images: torch.Tensor, device: str = "auto"
) -> Array:
    """Log-probabilities float32 [stages, N, classes], averaged as the stages say, on the engines that serve."""
    loaded = [engines.load(calibration.uncalibrated(each), device) for each in networks]
    views = {
        (stage.network, stage.hflip): metrics.predict(loaded[stage.network], images.flip(2) if stage.hflip else images)
        for stage in stages
    }
    singles = [np.log(np.maximum(views[stage.network, stage.hflip].numpy(), PROBABILITY_FLOOR)) for stage in stages]
    return averages(stages, singles)


@torch.inference_mode()
def reference_outputs(networks: Sequence[Weights], stages: Sequence[Stage], images: NDArray[np.uint8]) -> Array:
    """Probabilities float32 [stages, R, classes] after each stage, in float32 on the CPU."""
    loaded = [load_network(each) for each in networks]
    singles = []
    for stage in stages:
        batch = torch.from_numpy(np.ascontiguousarray(images[:, :, ::-1] if stage.hflip else images))
        softmax = loaded[stage.network](batch.permute(0, 3, 1, 2)).softmax(1).numpy()
        singles.append(np.log(np.maximum(softmax, PROBABILITY_FLOOR)))
    means = averages(stages, singles)
    return np.stack([probabilities_of(*each) for each in zip(stages, means, strict=True)])


def evaluate(engine: CascadeEngine, card: ModelCard, name: str, split: Split) -> dict[str, Any]:
    """Metrics of the cascade as served, on clean images and as JPEG; keys begin with `name`. Also the engine."""
    clean = _evaluate(engine, card, name, split.images, split.labels)
    clean["engine"] = provenance.engine(engine)
    return clean | _evaluate(engine, card, f"{name}_jpeg80", calibration.as_jpeg(split.images), split.labels)


def _evaluate(
    engine: CascadeEngine, card: ModelCard, name: str, images: torch.Tensor, labels: torch.Tensor
) -> dict[str, Any]:
    """Accuracy and calibration; mean cost, and of each stage the share of images and its accuracy on all of them."""
    batches = [np.ascontiguousarray(part.numpy()) for part in images.split(metrics.ENGINE_BATCH)]
    served = [engine(batch) for batch in batches]
    stages = [engine.run_stages(batch, early_exit=False) for batch in batches]
    exits = np.concatenate([output.stages for output in served])
    shares = np.array([(exits >= stage).mean() for stage in range(len(card.stages))])
    costs = [card.networks[stage.network].forward_gflops or 0.0 for stage in card.stages]
    accuracies = [metrics.accuracy(_concatenated(each), labels) for each in zip(*stages, strict=True)]
    return {
        **split_results(name, _concatenated(served), labels),
        f"{name}_gflops": _mean_cost(shares, costs),
        f"{name}_stage_shares": shares.round(4).tolist(),
        f"{name}_stage_accuracies": [round(each, 4) for each in accuracies],
    }


def _mean_cost(shares: NDArray[np.floating], costs: Sequence[float]) -> float:
    """GFLOPs of an image, for the shares of images that reach each stage."""
    return float(f"{np.dot(shares, costs):.4g}")


def _concatenated(outputs: Sequence[Output]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate([output.probabilities for output in outputs]))


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = cli.Parser(
        prog="python -m training.cascade", description=(__doc__ or "").splitlines()[0], allow_abbrev=False
    )
    add = parser.add_argument
    add("networks", type=Path, nargs="+", metavar="FILE", help="weights files of single networks")
    add("--stage", type=parse_stage, action="append", required=True, metavar="N[:flip][:K]", help="a stage, in order")
    selection.add_flags(parser)
    add("--out", type=Path, required=True, metavar="FILE", help="weights file to write")
    add("--name", help="name on the model card [name of --out]")
    add("--max-loss", type=selection.share, default=MAX_LOSS, metavar="SHARE",
        help="accuracy that early exits may cost, against the last stage for every image [%(default)s]")  # fmt: skip
    add("--runs", type=Path, metavar="FILE", help="JSON list of the training runs, for the card")
    add("--device", default="auto", help="auto, cpu, cuda or mps, for calibration and results [%(default)s]")
    add("--overwrite", action="store_true", help="replace the file of --out")
    add("--no-test", action="store_true", help="do not read the test images")
    return parser.parse_args(argv)


def run(arguments: argparse.Namespace) -> None:
    start = time.perf_counter()
    name = arguments.name or arguments.out.stem
    cli.check_output(name, arguments.out, arguments.overwrite)
    runs = _read_runs(arguments.runs) if arguments.runs else []
    networks = [weights_file.load(file) for file in arguments.networks]
    for file, network in zip(arguments.networks, networks, strict=True):
        check_held_out_images(file, network.card)
    try:
        check_references(arguments.stage, len(networks))
    except ValueError as error:
        detail = (
            f"it names none of the {len(networks)} files, which count from 0, or averages more stages than there are"
        )
        raise DataError(f"--stage: {error}: {detail}.") from None
    if unused := set(range(len(networks))) - {stage.network for stage in arguments.stage}:
        raise DataError(f"No --stage names {arguments.networks[min(unused)]}, file {min(unused)}.")
    dataset = _load_data(arguments, networks)
    train, val = data.recorded_split(dataset, *(each.card.recipe for each in networks))
    first = arguments.stage[0].network
    networks = [
        _with_ood(each, train, val, arguments.device) if index == first else without_ood(each)
        for index, each in enumerate(networks)
    ]
    cascade = compose(networks, arguments.stage, name, val, arguments.max_loss, runs, arguments.device)
    engine = engines.load(cascade, arguments.device)
    assert isinstance(engine, CascadeEngine)
    cascade = with_baseline(cascade, engine, val)
    card = cascade.card
    results = evaluate(engine, card, "val", val)
    if len(dataset.test):
        results |= evaluate(engine, card, "test", dataset.test)
        update = {"test_accuracy": results["test_accuracy"], "forward_gflops": results["test_gflops"] or None}
        card = card.model_copy(update=update)
    results |= provenance.step(time.perf_counter() - start, torch.device(engine.device))
    save(arguments.out, card.model_copy(update={"results": results}), *cascade[1:4], cascade.reference_stages)
    for metric, value in results.items():
        print(f"{metric:28} {value}")


def _read_runs(file: Path) -> list[dict[str, Any]]:
    """Raises DataError for other content than a JSON list of objects, and OSError."""
    try:
        runs = json.loads(file.read_text())
    except ValueError as error:
        raise DataError(f"--runs: {file} is no JSON: {error}.") from None
    if not isinstance(runs, list) or not all(isinstance(run, dict) for run in runs):
        raise DataError(f"--runs: {file} is no JSON list of runs.")
    return runs


def check_held_out_images(file: Path, card: ModelCard) -> None:
    """Raises DataError for a file without validation images that its training has not used."""
    if card.recipe.get("finetune") == "head":
        kind = "a linear head, which is fitted to all training images"
    elif "dp_epsilon" in card.recipe:
        kind = "a head of --dp-epsilon, which is fitted to all training images"
    elif card.architecture == "cascade":
        kind = "a cascade; name the files of its networks"
    elif "seed" not in card.recipe or card.recipe.keys().isdisjoint(("val_fraction", "holdout")):
        kind = "a file whose card lacks --val-fraction and --seed of the training"
    else:
        return
    raise DataError(f"{file} is {kind}; the thresholds need images that no network was trained on.")


def _load_data(arguments: argparse.Namespace, networks: Sequence[Weights]) -> Dataset:
    chosen, unread = selection.from_flags(arguments), ["test"] if arguments.no_test else []
    if arguments.no_test:  # what was held out of the training of the networks stays unread
        fraction, seed = map(networks[0].card.recipe.get, HELD_OUT)
        chosen = chosen._replace(test_fraction=fraction or 0.0, split_seed=seed or 0)
    card = networks[0].card
    dataset = data.load(arguments.data, card.input_size, data.SPLITS, chosen, unread)
    cli.print_remarks(dataset.rejected, dataset.notes)
    if absent := [name for name in card.classes if name not in dataset.classes]:
        raise DataError(f"{arguments.data} lacks classes of the networks: {shortened(absent)}.")
    return data.with_labels_of(card.classes, dataset, arguments.data)


def _with_ood(network: Weights, train: Split, val: Split, device: str) -> Weights:
    """For its plain softmax: a cascade calibrates its exits, not its networks."""
    scored = with_ood(calibration.uncalibrated(network), train, val, device)
    return network._replace(card=network.card.model_copy(update={"ood": scored.card.ood}), state=scored.state)


def main(argv: list[str] | None = None) -> None:
    with cli.errors_in_one_line():
        run(parse(argv))


if __name__ == "__main__":
    main()
