"""Command-line flags, generated from the fields of `Recipe`.

With argparse rather than pydantic-settings' CliApp (tried with 2.16): CliApp's --help shows no bounds, prints tuples as
`(8, 8)` where the flag reads `8,8` and lists deprecated names beside the current ones, and its settings classes read
unprefixed environment variables such as SEED or DEPTH.
"""

import argparse
import logging
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args, get_origin

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from app.errors import SettingsError, ThirtytwoError
from app.model.card import NAME_PATTERN
from training.recipe import DEFAULT_RECIPES, IMMUTABLE_FIELDS, SECTIONS, Recipe

METAVARS: dict[Any, str] = {int: "INT", float: "FLOAT", str: "FILE"}
CHOICES = ("finetune", "class_balance")  # fields with the value `auto`
OPERATORS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}

logger = logging.getLogger(__name__)


class Parser(argparse.ArgumentParser):
    """Reports a wrong command line in one line, with exit code 2: the usage of thirty flags hides the error."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; see --help\n")


@contextmanager
def errors_in_one_line() -> Iterator[None]:
    """Ends the process after an error that a user can mend: with exit code 2 for a setting, with 1 for another.

    After Ctrl-C the exit code is 130.
    """
    try:
        yield
    except SettingsError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except (ThirtytwoError, OSError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)  # 128 + SIGINT, as shells report it


def print_remarks(rejected: Sequence[tuple[Path, str]], notes: Sequence[str]) -> None:
    """Rejected files with the reason, and notes on the data, on stderr."""
    for line in (*(f"rejected {path}: {reason}" for path, reason in rejected), *notes):
        print(line, file=sys.stderr)


def check_name(name: str) -> None:
    """Raises SettingsError for a name that no card can have."""
    if not re.fullmatch(NAME_PATTERN, name):
        raise SettingsError(f"Invalid name {name!r}: letters, digits, _, . and - only, at most 64.")


def check_output(name: str, file: Path, overwrite: bool) -> None:
    """Raises SettingsError for an invalid name, a file that exists, or one that cannot be written."""
    check_name(name)
    parent = next(folder for folder in file.absolute().parents if folder.exists())
    if file.is_dir() or not parent.is_dir() or not os.access(parent, os.W_OK):
        raise SettingsError(f"--out: {file} is a folder or is in none that can be written.")
    if file.exists() and not overwrite:
        raise SettingsError(f"--out: {file} is of an earlier run: choose another name, or --overwrite it.")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds one flag per field of Recipe. A flag that is not given is None: its default depends on the arch."""
    for section in SECTIONS:
        group = parser.add_argument_group(section.__doc__)
        for name, field in section.model_fields.items():
            # Values stay text: pydantic converts them, so that all errors have one form.
            options: dict[str, Any] = {"default": None, "help": f"{field.description}{_default_and_bounds(field)}"}
            if field.annotation is bool:
                options["action"] = argparse.BooleanOptionalAction
            elif get_origin(field.annotation) is Literal:
                options["choices"] = get_args(field.annotation)
            else:
                options["metavar"] = "N,..." if get_origin(field.annotation) is tuple else METAVARS[field.annotation]
            group.add_argument("--" + name.replace("_", "-"), **options)


def _default_and_bounds(field: FieldInfo) -> str:
    """` [0.05; > 0 and < 1]`; empty for a field without either."""
    value = {True: "on", False: "off"}.get(field.default, field.default) if field.annotation is bool else field.default
    default = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
    bounds = [
        f"{operator} {getattr(bound, name):g}"
        for bound in field.metadata
        for name, operator in OPERATORS.items()
        if hasattr(bound, name)
    ]
    parts = [part for part in (default, " and ".join(bounds)) if part]
    return f" [{'; '.join(parts)}]" if parts else ""


def given(arguments: argparse.Namespace) -> set[str]:
    """The fields of Recipe whose flags are on the command line."""
    return {name for name in Recipe.model_fields if getattr(arguments, name) is not None}


def from_flags(arguments: argparse.Namespace, resumed_from: Recipe | None = None) -> Recipe:
    """The recipe of the resumed run, or the arch's default one, with the given flags.

    Raises SettingsError, in one line, for an invalid value or one that a resumed run cannot change.
    """
    flags = {name: getattr(arguments, name) for name in given(arguments)}
    if resumed_from:  # the checkpoint has what `auto` chose
        flags = {name: value for name, value in flags.items() if name not in CHOICES or value != "auto"}
    if "epochs" in flags and "max_steps" not in flags:
        flags["max_steps"] = 0  # of the default recipe or of the checkpoint; it would take precedence
    # Flags that are not given keep the value of the checkpoint, not the default.
    base = resumed_from or DEFAULT_RECIPES[flags.get("arch", "convnet")]
    recipe = validated(base.model_dump() | flags)
    # A checkpoint of 0.1 has no choice of fine-tuning.
    fixed = (*IMMUTABLE_FIELDS, "finetune") if base.finetune != "auto" else IMMUTABLE_FIELDS
    changed = [name for name in fixed if getattr(recipe, name) != getattr(base, name)]
    if resumed_from and changed:
        raise SettingsError(f"--resume cannot change {', '.join(map(_flag, changed))}.")
    return recipe


def validated(values: Mapping[str, Any]) -> Recipe:
    """The recipe of these fields; raises SettingsError, in one line."""
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise SettingsError(one_line(error)) from None


def replace_deprecated(argv: Sequence[str], names: Mapping[str, str]) -> list[str]:
    """The command line with former flags replaced by current ones, and a warning for each."""
    flags = {_flag(old): _flag(new) for old, new in names.items()}
    flags |= {_flag(f"no_{old}"): _flag(f"no_{new}") for old, new in names.items()}
    current = []
    for argument in argv:
        flag, equals, value = argument.partition("=")
        if flag in flags:
            logger.warning("%s is deprecated; use %s", flag, flags[flag])
            flag = flags[flag]
        current.append(flag + equals + value)
    return current


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def one_line(error: ValidationError) -> str:
    first = error.errors()[0]
    if not first["loc"]:
        return first["msg"].removeprefix("Value error, ") + "."
    return f"{_flag(str(first['loc'][0]))}: {first['msg'].lower()}, not {first['input']!r}."
