"""What a run writes: its folders, the weights file of a linear head, and the report."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from app.errors import SettingsError
from app.model.weights import save
from training import cli, finetune, metrics, report
from training.audit import summary
from training.data import Dataset, Split
from training.history import Epoch
from training.plan import Plan
from training.selection import Validation

logger = logging.getLogger(__name__)


class Output(NamedTuple):
    """Where a run writes, and whether its report is on validation images in place of test images."""

    name: str
    file: Path
    run_dir: Path
    no_test: bool


def check_names(name: str, **files: str) -> None:
    """Raises SettingsError, before the data are read, for an invalid name or a file of a flag that does not exist."""
    cli.check_name(name)
    for flag, file in files.items():
        if file and not Path(file).is_file():
            raise SettingsError(f"--{flag.replace('_', '-')}: there is no file {file}.")


def report_files(dataset: Dataset) -> None:
    """Prints what was read, and logs what was rejected or is suspicious."""
    print(
        f"{dataset.name}: {len(dataset.train)} training and {len(dataset.test)} test images of "
        f"{len(dataset.classes)} classes"
    )
    print(report.class_counts(dataset.classes, dataset.train.labels))
    for line in (*dataset.notes, *summary.lines(dataset)):
        print(line)
    if dataset.dark_16_bit:
        logger.warning(
            "%d files of 16 bits a channel use the lowest 12 bits only and are nearly black, such as %s; "
            "multiply their values by 16",
            len(dataset.dark_16_bit),
            dataset.dark_16_bit[0],
        )


def refuse_used_names(out: Path, run_dir: Path) -> None:
    """Raises SettingsError where files of an earlier run would be lost."""
    for used in (run_dir / "checkpoint.pt", out):
        if used.exists():
            raise SettingsError(
                f"{used} is of an earlier run: choose another --out, or --resume it, or --overwrite it."
            )


@contextmanager
def new_folders(*folders: Path) -> Iterator[None]:
    """Creates folders, and after an error removes those of them that are empty; raises OSError."""
    created = {path for folder in folders for path in (folder, *folder.parents) if not path.exists()}
    try:
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for path in sorted(created, key=lambda path: len(path.parts), reverse=True):
            with suppress(OSError):  # not empty
                path.rmdir()
        raise


def write_head(output: Output, dataset: Dataset, plan: Plan, held_out: Validation, device: str = "auto") -> None:
    """The weights file of a linear head and its report.

    Without test images that is on the data's own validation images, or else on cross-validated predictions.
    """
    assert plan.head is not None
    assert plan.backbone is not None
    start = f"{plan.backbone.card.name} {plan.backbone.version}"
    recorded = plan.recipe.model_copy(update={"initial_weights": start, "hflip": plan.head.hflip})
    loaded = finetune.compose(output.name, dataset, recorded, plan.backbone, plan.head, held_out, device)
    name, split = "cross-validated", dataset.train.select(held_out.head_images())
    probabilities = finetune.cross_validated(plan.head, loaded.card)
    if held_out.own:
        name, split = "validation", dataset.train.select(held_out.mask)
        loaded, probabilities = finetune.evaluate(loaded, "val", split, device)
    if not output.no_test:
        name, split = "test", dataset.test
        loaded, probabilities = finetune.evaluate(loaded, name, split, device)
    save(output.file, *loaded[:4], loaded.reference_stages)
    write_report(output, name, [], probabilities, split, dataset, plan)


def write_report(
    output: Output,
    split_name: str,
    history: list[Epoch],
    probabilities: Tensor,
    split: Split,
    dataset: Dataset,
    plan: Plan,
) -> None:
    """Writes the report on one split's images and prints its headline."""
    choices = "\n".join(map(str, plan.choices)) or "all values are given"
    sections = {
        "Training images": report.class_counts(dataset.classes, dataset.train.labels),
        "Recipe": choices,
    }
    title = f"{output.name}, {split_name} images"
    results = write_metrics(output.run_dir, title, split, probabilities, dataset.classes, history, sections)
    for warning in report.warnings(results):
        logger.warning("%s", warning)
    seconds = f" after {history[-1].seconds:.0f} s of training" if history else ""
    print(
        f"{output.file}: {split_name} accuracy {results['accuracy']:.2%}, balanced "
        f"{results['balanced_accuracy']:.2%}{seconds}; report in {output.run_dir}/report.md"
    )


def write_metrics(
    folder: Path,
    title: str,
    split: Split,
    probabilities: Tensor,
    classes: list[str],
    history: Sequence[Epoch] = (),
    sections: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Writes the report of probabilities float32 [N, classes] into the folder; returns its metrics. Raises OSError."""
    results = metrics.classification_metrics(probabilities, split.labels, classes)
    mistakes = report.top_losses(split.images, probabilities, split.labels, classes)
    report.write_run(folder, title, [epoch._asdict() for epoch in history], results, mistakes, sections)
    return results
