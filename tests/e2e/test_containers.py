"""Dockerfile and compose files, as far as they can be checked without a container engine."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from app import __version__
from app.settings import Settings
from tests.support.requirements import requirements

ROOT = Path(__file__).parents[2]
HADOLINT = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which("hadolint")
DOCKERFILE = re.sub(r"\\\n", "", (ROOT / "Dockerfile").read_text())


class Loader(yaml.SafeLoader):
    """Reads compose's `!reset` as a string."""


Loader.add_constructor("!reset", lambda loader, node: "reset")


def compose(name: str = "docker-compose.yml") -> dict[str, Any]:
    services: dict[str, Any] = yaml.load((ROOT / name).read_text(), Loader)["services"]  # noqa: S506 (a SafeLoader)
    return services


def seconds(text: str) -> int:
    return int(text.removesuffix("s"))


def healthy(port: int) -> bool:
    """Runs the image's HEALTHCHECK here."""
    command = json.loads(re.search(r"HEALTHCHECK .*?CMD (\[.*\])", DOCKERFILE).group(1))
    command[0] = sys.executable
    environment = {**os.environ, "THIRTYTWO_PORT": str(port)}
    return subprocess.run(command, env=environment, capture_output=True, check=False).returncode == 0


def test_health_check_succeeds_for_a_ready_service_only(client: httpx.Client) -> None:
    assert healthy(client.base_url.port or 0)
    assert not healthy(1)


def test_build_context_holds_exactly_what_is_copied() -> None:
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copies = re.findall(r"^COPY (?!--from)(.*) \S+$", DOCKERFILE, re.MULTILINE)
    copied = {name for names in copies for name in names.split()}
    assert kept == {name.partition("/")[0] for name in copied}
    assert [name for name in copied if not (ROOT / name).exists()] == []


def installed(stage: str) -> set[str]:
    """Names that a stage of the Dockerfile installs by extras."""
    body = re.search(rf"^FROM \S+ AS {stage}$(.*?)(?=^FROM|\Z)", DOCKERFILE, re.MULTILINE | re.DOTALL)[1]
    return set(requirements(*re.findall(r"--editable '\.\[(\w+)\]'", body)))


def test_only_the_larger_images_install_torch() -> None:
    assert "openvino" in installed("cpu")
    assert "opentelemetry-exporter-otlp-proto-http" in installed("cpu")
    assert "torch" not in installed("cpu")
    assert "torch" in installed("cuda")
    assert {"torch", "torchvision", "matplotlib"} <= installed("train")


@pytest.mark.skipif(HADOLINT is None, reason="needs the extra deploy")
def test_hadolint_reports_nothing() -> None:
    done = subprocess.run([HADOLINT, ROOT / "Dockerfile"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_services_are_locked_down_and_reserve_a_gpu() -> None:
    ours = {name: service for name, service in compose().items() if "build" in service}
    for service in ours.values():
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert service["deploy"]["resources"]["reservations"]["devices"][0]["capabilities"] == ["gpu"]
        assert f" AS {service['build']['target']}\n" in DOCKERFILE
    without = compose("docker-compose.cpu.yml")
    assert {name: service["deploy"] for name, service in without.items()} == dict.fromkeys(ours, "reset")
    assert without["thirtytwo"]["build"]["args"] == {"VARIANT": "cpu"}
    assert compose()["thirtytwo"]["environment"] == {"THIRTYTWO_DEVICE": "${THIRTYTWO_DEVICE:-cuda}"}
    assert without["thirtytwo"]["environment"] == {"THIRTYTWO_DEVICE": "${THIRTYTWO_DEVICE:-cpu}"}


def test_stop_grace_period_exceeds_the_shutdown_timeout() -> None:
    assert seconds(compose()["thirtytwo"]["stop_grace_period"]) > Settings().shutdown_timeout_s


def test_only_the_service_port_is_published() -> None:
    ports = {name: service["ports"] for name, service in compose().items() if "ports" in service}
    assert ports.pop("thirtytwo") == ["8000:8000"]
    assert all(port.startswith("127.0.0.1:") for published in ports.values() for port in published)


def test_deployment_page_names_existing_files_and_variables() -> None:
    document = (ROOT / "docs" / "deployment.md").read_text()
    paths = set(re.findall(r"(?:deploy/[\w./-]+|docker-compose[\w.]*\.yml)", document))
    assert len(paths) >= 5
    assert [path for path in paths if not (ROOT / path.rstrip(".")).exists()] == []
    assert set(re.findall(r"thirtytwo:(\d+\.\d+\.\d+)", document)) <= {__version__}
    variables = set(re.findall(r"^\| `([A-Z_]+)` \|", document, re.MULTILINE))
    ours = {name for name in variables if not name.startswith("OTEL_")}
    assert ours == set(re.findall(r"\$\{(\w+):-", (ROOT / "docker-compose.yml").read_text()))
