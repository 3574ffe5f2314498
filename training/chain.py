"""Trains the networks of a recipe file one after the other and composes them into a cascade.

    python -m training.chain cifar10 --data DIR --out weights/cifar10.safetensors

The file is a name in training/recipes or a path. Every run is a call of `training.train`, the last step one of
`training.cascade`; both are printed as commands. The same command resumes an interrupted chain: finished runs are kept
in the run folder, the current one continues from its checkpoint.
"""

import argparse
import json
import shlex
import tomllib
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from app.errors import SettingsError
from app.model import weights
from app.model.card import check_references
from training import cascade, checkpoint, cli, data, train
from training.data import HELD_OUT
from training.datasets import selection
from training.exits import MAX_LOSS
from training.recipe import DEFAULT_RECIPES, IMMUTABLE_FIELDS, Recipe

RECIPES = Path(__file__).parent / "recipes"

FIXED = (*IMMUTABLE_FIELDS, "finetune")  # for all runs of a network

Flags = dict[str, Any]


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid")


class NetworkTable(_Table):
    name: Annotated[str, Field(pattern=r"^[\w.-]{1,64}$")]
    runs: Annotated[list[Flags], Field(min_length=1)]


class CascadeTable(_Table):
    """A stage is the name of a network and the options of `training.cascade`: `large:flip:3`."""

    stages: Annotated[list[str], Field(min_length=1)]
    max_loss: Annotated[float, Field(ge=0, lt=1)] = MAX_LOSS


class ChainFile(_Table):
    """`defaults` are flags of every run; those of a run hold for the later runs of its network, too."""

    defaults: Flags = {}
    networks: Annotated[list[NetworkTable], Field(min_length=1)]
    cascade: CascadeTable

    @field_validator("networks")
    @classmethod
    def _have_names_of_their_own(cls, networks: list[NetworkTable]) -> list[NetworkTable]:
        names = [network.name for network in networks]  # also those of their folders
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"several networks have the name {', '.join(twice)}")
        return networks


class Run(NamedTuple):
    """One call of `training.train`. `number` counts the runs of the network from 1; all of them share `folder`."""

    network: str
    number: int
    folder: Path
    flags: Flags

    @property
    def out(self) -> Path:
        return self.folder / f"{self.number}.safetensors"

    @property
    def is_started(self) -> bool:
        return self.number > 1 or (self.folder / "checkpoint.pt").exists()


def load(name: str) -> ChainFile:
    """Raises SettingsError, in one line, for a file that is missing or invalid."""
    path = Path(name) if name.endswith(".toml") else RECIPES / f"{name}.toml"
    try:
        return ChainFile.model_validate(tomllib.loads(path.read_text()))
    except FileNotFoundError:
        known = ", ".join(sorted(file.stem for file in RECIPES.glob("*.toml")))
        raise SettingsError(f"There is no recipe {name}; there are {known}, or a path to a .toml file.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path}: {error}.") from None
    except ValidationError as error:
        first = error.errors()[0]
        raise SettingsError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg'].lower()}.") from None


def plan(chain: ChainFile, run_dir: Path) -> list[Run]:
    """The runs in order, with the teachers' names replaced by files; raises SettingsError for an invalid flag."""
    runs: list[Run] = []
    files: dict[str, Path] = {}  # of `network` and `network/number`
    recipes: dict[str, Recipe] = {}  # of the first run of each network
    for network in chain.networks:
        # Without choices that depend on the data: a run is made by its flags only.
        flags = {"finetune": "none", "class_balance": "none"} | chain.defaults
        for number, own in enumerate(network.runs, start=1):
            flags |= own
            resolved = dict(flags)
            if teacher := flags.get("teacher"):
                if teacher not in files:
                    raise SettingsError(f"{network.name}/{number}: the teacher {teacher} is not an earlier run.")
                resolved["teacher"] = str(files[teacher])
            run = Run(network.name, number, run_dir / network.name, resolved)
            recipe = _check(run)
            first = recipes.setdefault(network.name, recipe)
            if changed := [field for field in FIXED if getattr(recipe, field) != getattr(first, field)]:
                raise SettingsError(f"{network.name}/{number}: {', '.join(changed)} cannot change between runs.")
            runs.append(run)
            files[network.name] = files[f"{network.name}/{number}"] = run.out
    return runs


def composed(chain: ChainFile) -> list[str]:
    """The networks that stages name, in the order of the file: others are teachers only."""
    named = {stage.partition(":")[0] for stage in chain.cascade.stages}
    return [network.name for network in chain.networks if network.name in named]


def stages(chain: ChainFile) -> list[str]:
    """As `training.cascade` reads them, with indices into `composed`; raises SettingsError for an invalid one."""
    names = composed(chain)
    texts, parsed = [], []
    for stage in chain.cascade.stages:
        name, *options = stage.split(":")
        if name not in names:
            known = ", ".join(network.name for network in chain.networks)
            raise SettingsError(f"The stage {stage} names none of the networks {known}.")
        texts.append(":".join([str(names.index(name)), *options]))
        try:
            parsed.append(cascade.parse_stage(texts[-1]))
            check_references(parsed, len(names))
        except ValueError:
            form = "NETWORK[:flip][:K], where K is at most the number of stages so far"
            raise SettingsError(f"The stage {stage} is not of the form {form}.") from None
    return texts


def _check(run: Run) -> Recipe:
    """The recipe of the run; raises SettingsError."""
    where = f"{run.network}/{run.number}"
    unknown = run.flags.keys() - Recipe.model_fields.keys()
    if unknown:
        raise SettingsError(f"{where}: {', '.join(sorted(unknown))} is not a flag of training.train.")
    try:
        # As training.train completes the flags; an unknown arch is an error of the validation.
        base = DEFAULT_RECIPES.get(str(run.flags.get("arch")), DEFAULT_RECIPES["convnet"])
        recipe = Recipe.model_validate(base.model_dump() | run.flags)
    except ValidationError as error:
        raise SettingsError(f"{where}: {cli.one_line(error)}") from None
    if recipe.finetune == "head":
        raise SettingsError(f"{where}: a linear head cannot be in a chain; its training uses the validation images.")
    if run.out.exists():
        # A card has the versions of files in place of their paths, and choices in place of `auto`. Fine-tuning also
        # chooses what no flag gives.
        fixed = set(Recipe.model_fields) if recipe.finetune == "none" else set(run.flags)
        fixed -= {"teacher", "initial_weights"} | {name for name, value in run.flags.items() if value == "auto"}
        recorded = weights.load(run.out).card.recipe
        made_by = Recipe.model_validate({key: recorded[key] for key in recorded.keys() - set(HELD_OUT)})
        if made_by.model_dump(include=fixed) != recipe.model_dump(include=fixed):
            raise SettingsError(f"{run.out} was made by another recipe; another --run-dir starts anew.")
    return recipe


def check_data(runs: list[Run], arguments: argparse.Namespace) -> None:
    """Raises DataError where runs that are kept have read other training images or labels than `--data` has now."""
    files = dict.fromkeys(run.folder / "checkpoint.pt" for run in runs)
    states = {file: checkpoint.load(file) for file in files if file.exists()}
    read: dict[int, dict[str, Any]] = {}  # fingerprints by image size
    for file, state in states.items():
        size = state["recipe"]["image_size"]
        if size not in read:
            splits = ["train"] if arguments.no_test else data.SPLITS
            dataset = data.load(arguments.data, size, splits, selection.from_flags(arguments), unread=["test"])
            read[size] = data.fingerprint(data.with_validation(dataset)[0])
        rule = f"The runs in {file.parent} continue on the same data only (another --run-dir starts anew); its"
        checkpoint.check_fingerprint(state, read[size], rule)


def is_finished(chain: ChainFile, runs: list[Run], out: Path) -> bool:
    """Whether the file is the cascade of this chain and these runs; raises WeightsError for a damaged file."""
    if not all(file.is_file() for file in (out, *(run.out for run in runs))):
        return False
    parsed = [cascade.parse_stage(text) for text in stages(chain)]
    return weights.load(out).card.recipe == cascade.recipe_of(parsed, chain.cascade.max_loss, record(runs))


def train_run(run: Run, arguments: argparse.Namespace) -> None:
    argv = [*selection.as_flags(arguments), "--out", str(run.out)]
    argv += ["--name", run.network, "--run-dir", str(run.folder)]
    # The networks must not see the images that the cascade reports as test images.
    test = "--no-test" if arguments.no_test else "--unread-test"
    argv += ["--device", arguments.device, test, *_as_flags(run.flags)]
    argv += ["--resume"] if run.is_started else []
    print(f"$ python -m training.train {shlex.join(argv)}", flush=True)
    train.main(argv)


def record(runs: list[Run]) -> list[dict[str, Any]]:
    """What made each network, for the card: flags, seconds, commit, machine and version of every run."""
    records: list[dict[str, Any]] = []
    before: dict[str, int] = {}  # seconds by network: a run continues the time of the one before
    for run in runs:
        loaded = weights.load(run.out)
        results = loaded.card.results
        total = results.get("training_s") or 0
        records.append(
            {"network": run.network, "run": run.number, "version": loaded.version, "flags": loaded.card.recipe}
            | {"training_s": total - before.get(run.network, 0)}
            | {name: results.get(name) for name in ("commit", "machine")}
        )
        before[run.network] = total
    return records


def run(arguments: argparse.Namespace) -> None:
    chain = load(arguments.recipe)
    name = arguments.name or arguments.out.stem
    run_dir: Path = arguments.run_dir or Path("runs") / name
    runs = plan(chain, run_dir)
    stage_flags = [text for stage in stages(chain) for text in ("--stage", stage)]
    if not arguments.overwrite and is_finished(chain, runs, arguments.out):
        check_data(runs, arguments)
        print(f"{arguments.out} is finished; --overwrite composes it again from the networks in {run_dir}.")
        return
    cli.check_output(name, arguments.out, arguments.overwrite)
    if arguments.download:
        data.download(arguments.data, arguments.dataset or "cifar10")
    check_data(runs, arguments)
    for each in runs:
        if not each.out.exists():
            train_run(each, arguments)
        # A head of finetune auto ends the chain here, not after the networks that follow.
        cascade.check_held_out_images(each.out, weights.load(each.out).card)
    history = run_dir / "runs.json"
    history.write_text(json.dumps(record(runs), indent=1) + "\n")
    files = {each.network: str(each.out) for each in runs}  # of the last run of each network
    argv = [*(files[network] for network in composed(chain)), *stage_flags, *selection.as_flags(arguments)]
    argv += ["--out", str(arguments.out), "--name", name]
    argv += ["--device", arguments.device, "--max-loss", str(chain.cascade.max_loss), "--runs", str(history)]
    argv += [flag for flag in ("--no-test", "--overwrite") if getattr(arguments, flag[2:].replace("-", "_"))]
    print(f"$ python -m training.cascade {shlex.join(argv)}", flush=True)
    cascade.main(argv)


def _as_flags(flags: Flags) -> list[str]:
    texts: list[str] = []
    for name, value in flags.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            texts.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            texts += [f"--{flag}", ",".join(map(str, value)) if isinstance(value, list) else str(value)]
    return texts


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = cli.Parser(
        prog="python -m training.chain", description=(__doc__ or "").splitlines()[0], allow_abbrev=False
    )
    add = parser.add_argument
    add("recipe", metavar="RECIPE", help="name in training/recipes, or path to a .toml file")
    selection.add_flags(parser)
    add("--download", action="store_true", help="download --dataset, or else CIFAR-10, into --data first")
    add("--out", type=Path, required=True, metavar="FILE", help="weights file to write")
    add("--name", help="name on the model card [stem of --out]")
    add("--run-dir", type=Path, metavar="DIR", help="folder of the runs [runs/<name>]")
    add("--device", default="auto", help="auto, cpu, cuda or mps [%(default)s]")
    add("--overwrite", action="store_true", help="replace the file of --out; finished networks are kept")
    add("--no-test", action="store_true", help="train on all images and read no test images")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    arguments = parse(argv)
    with cli.errors_in_one_line():
        run(arguments)


if __name__ == "__main__":
    main()
