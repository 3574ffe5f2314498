"""The flags of `python -m app`, made from the settings: a flag has precedence over its environment variable."""

from argparse import ArgumentParser, _ArgumentGroup
from typing import Any

from pydantic import ValidationError
from pydantic_settings import CliApp, CliSettingsSource

from app import settings
from app.settings import DEPRECATED, GROUPS, PREFIX, REMOVED, Settings

METAVARS = {"int": "N", "float": "N", "bool": "BOOL", "str": "TEXT", "Path": "FILE"}
NO_NONE = "\0"  # no flag can hold it, so that the file or key named null stays one
DESCRIPTION = "Serves a weights file over HTTP. Other commands: python -m app classify|healthcheck --help"


def parse(argv: list[str]) -> tuple[Settings, list[str]]:
    """The settings from flags, environment and defaults, and a warning for each deprecated flag.

    Raises SettingsError with one line that names the variable of a wrong value. `--help` and unknown flags exit.
    """
    argv, warnings = replace_deprecated(argv)
    source = _source()
    try:
        return CliApp.run(Settings, cli_args=argv, cli_settings_source=source), warnings
    except ValidationError as error:
        raise settings.invalid(error) from error


def replace_deprecated(argv: list[str]) -> tuple[list[str], list[str]]:
    """The arguments with new names for deprecated flags. Removed flags, and old ones beside new ones, are dropped."""
    flags = {_flag(old): _flag(new) for old, new in DEPRECATED.items()}
    removed = {_flag(old): reason for old, reason in REMOVED.items()}
    kept: list[str] = []
    warnings: list[str] = []
    rest = iter(argv)
    for argument in rest:
        old, equals, value = argument.partition("=")
        if old not in flags and old not in removed:
            kept.append(argument)
            continue
        value = value if equals else next(rest, "")
        if old in removed:
            warnings.append(f"{old} has no effect: {removed[old]}")
            continue
        new = flags[old]
        if any(other.partition("=")[0] == new for other in argv):
            warnings.append(f"{old} is deprecated; use {new}; both are given, {new} has precedence")
        else:
            warnings.append(f"{old} is deprecated; use {new}")
            kept.append(f"{new}={value}")
    return kept, warnings


def _source() -> CliSettingsSource[ArgumentParser]:
    groups: list[_ArgumentGroup] = []

    def add_argument(parser: ArgumentParser, *flags: str, **options: Any) -> None:
        name = str(options.get("dest", ""))
        if name not in Settings.model_fields:
            parser.add_argument(*flags, **options)
            return
        if name in GROUPS:
            groups.append(parser.add_argument_group(GROUPS[name]))
        groups[-1].add_argument(*flags, **options | {"help": _help(name), "metavar": _metavar(options["metavar"])})

    source: CliSettingsSource[ArgumentParser] = CliSettingsSource(
        Settings,
        cli_prog_name="python -m app",
        cli_kebab_case=True,
        cli_hide_none_type=True,
        cli_parse_none_str=NO_NONE,
        add_argument_method=add_argument,
    )
    source.root_parser.usage = "python -m app [--FLAG VALUE]..."
    source.root_parser.description = DESCRIPTION
    return source


def _help(name: str) -> str:
    field = Settings.model_fields[name]
    default = ",".join(field.default) if isinstance(field.default, tuple) else field.default
    shown = "" if name == "weights" or default in ("", None) else f"={str(default).lower()}"
    return f"{field.description} [{PREFIX}{name.upper()}{shown}]".replace("%", "%%")


def _metavar(type_name: str) -> str:
    return type_name if type_name.startswith("{") else METAVARS.get(type_name.partition(",")[0], "LIST")


def _flag(name: str) -> str:
    return "--" + name.lower().replace("_", "-")
