"""What Dockerfile and compose files promise, as far as it can be seen without an engine."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import yaml

from app import __version__
from app.settings import Settings

ROOT = Path(__file__).parents[2]
DOCKERFILE = re.sub(r"\\\n", "", (ROOT / "Dockerfile").read_text())


class Loader(yaml.SafeLoader):
    """Reads compose's `!reset` as a mark."""


Loader.add_constructor("!reset", lambda loader, node: "reset")


def compose(name: str = "docker-compose.yml") -> dict[str, Any]:
    services: dict[str, Any] = yaml.load((ROOT / name).read_text(), Loader)["services"]  # noqa: S506 (a SafeLoader)
    return services


def seconds(text: str) -> int:
    return int(text.removesuffix("s"))


def healthy(port: int) -> bool:
    """Runs the image's HEALTHCHECK here."""
    command = json.loads(re.search(r"HEALTHCHECK .*?CMD (\[.*\])", DOCKERFILE).group(1))  # type: ignore[union-attr]
    command[0] = sys.executable
    environment = {**os.environ, "THIRTYTWO_PORT": str(port)}
    return subprocess.run(command, env=environment, capture_output=True, check=False).returncode == 0


def test_the_health_check_tells_a_ready_service_from_none(client: httpx.Client) -> None:
    assert healthy(client.base_url.port or 0)
    assert not healthy(1)


def test_the_build_context_holds_what_is_copied_and_nothing_else() -> None:
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = {name for names in re.findall(r"^COPY (.*) \S+$", DOCKERFILE, re.MULTILINE) for name in names.split()}
    assert kept == copied
    assert all((ROOT / name).exists() for name in copied)


def test_the_version_is_the_same_everywhere() -> None:
    assert f'image.version="{__version__}"' in DOCKERFILE
    for name in ("thirtytwo", "train"):
        assert compose()[name]["image"].endswith(f":{__version__}")


def test_our_services_are_locked_down_and_reserve_a_gpu_unless_told_otherwise() -> None:
    ours = {name: service for name, service in compose().items() if "build" in service}
    for service in ours.values():
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert service["deploy"]["resources"]["reservations"]["devices"][0]["capabilities"] == ["gpu"]
        assert f" AS {service['build']['target']}\n" in DOCKERFILE
    assert compose("docker-compose.cpu.yml") == {name: {"deploy": "reset"} for name in ours}


def test_a_stop_has_time_to_answer_what_was_accepted() -> None:
    assert seconds(compose()["thirtytwo"]["stop_grace_period"]) > Settings().drain_s


def test_only_the_service_is_reached_from_outside() -> None:
    ports = {name: service["ports"] for name, service in compose().items() if "ports" in service}
    assert ports.pop("thirtytwo") == ["8000:8000"]
    assert all(port.startswith("127.0.0.1:") for published in ports.values() for port in published)


def test_what_the_document_names_exists() -> None:
    document = (ROOT / "docs" / "deploying.md").read_text()
    paths = set(re.findall(r"(?:deploy/[\w./-]+|docker-compose[\w.]*\.yml)", document))
    assert len(paths) >= 5
    assert [path for path in paths if not (ROOT / path.rstrip(".")).exists()] == []
    variables = set(re.findall(r"^\| `([A-Z_]+)` \|", document, re.MULTILINE))
    assert variables == set(re.findall(r"\$\{(\w+):-", (ROOT / "docker-compose.yml").read_text()))
