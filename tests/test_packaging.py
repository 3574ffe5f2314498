"""The version ranges of pyproject.toml and the files of constraints agree."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.support.requirements import EXTRAS, requirements

ROOT = Path(__file__).parents[1]


def constraints(name: str) -> dict[str, str]:
    lines = [line for line in (ROOT / name).read_text().splitlines() if not line.startswith("#")]
    return {canonicalize_name(package): version for package, _, version in (line.partition("==") for line in lines)}


def lower_bound(requirement: Requirement) -> str:
    (version,) = (each.version for each in requirement.specifier if each.operator == ">=")
    return version


def padded(version: str) -> list[int]:
    return ([int(part) for part in version.split(".")] + [0, 0])[:3]


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize(("given", "host"), [([], "127.0.0.1"), (["HOST=0.0.0.0"], "0.0.0.0")])  # noqa: S104
def test_make_serve_listens_on_loopback_by_default(given: list[str], host: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "HOST"}
    command = ["make", "--no-print-directory", "--dry-run", "serve", *given]
    printed = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout
    assert f"-m app --host {host} --port" in printed


def test_the_image_listens_on_all_addresses() -> None:
    assert "THIRTYTWO_HOST=0.0.0.0" in (ROOT / "Dockerfile").read_text()


@pytest.mark.parametrize("name", sorted(requirements(*EXTRAS)))
def test_constraints_pin_every_direct_dependency(name: str) -> None:
    requirement = requirements(*EXTRAS)[name]
    assert constraints("constraints.txt")[name] in requirement.specifier


@pytest.mark.parametrize("name", sorted(requirements("dev")))
def test_lowest_constraints_are_the_lower_bounds(name: str) -> None:
    """A lower bound has no release of its own if the next patch release is the first one."""
    version, bound = constraints("constraints-lowest.txt")[name], lower_bound(requirements("dev")[name])
    assert padded(version)[:2] == padded(bound)[:2]
