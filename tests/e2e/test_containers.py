"""What Dockerfile and compose files promise, as far as it can be seen without an engine."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
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
    command = json.loads(re.search(r"HEALTHCHECK .*?CMD (\[.*\])", DOCKERFILE).group(1))
    command[0] = sys.executable
    environment = {**os.environ, "THIRTYTWO_PORT": str(port)}
    return subprocess.run(command, env=environment, capture_output=True, check=False).returncode == 0


def test_the_health_check_tells_a_ready_service_from_none(client: httpx.Client) -> None:
    assert healthy(client.base_url.port or 0)
    assert not healthy(1)


def test_the_build_context_holds_what_is_copied_and_nothing_else() -> None:
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copies = re.findall(r"^COPY (?!--from)(.*) \S+$", DOCKERFILE, re.MULTILINE)
    copied = {name for names in copies for name in names.split()}
    assert kept == copied
    assert all((ROOT / name).exists() for name in copied)


def test_the_cpu_image_installs_everything_but_torch(tmp_path: Path) -> None:
    command = re.search(r'RUN python -c "(import tomllib.*?)"$', DOCKERFILE, re.MULTILINE).group(1)
    text = (ROOT / "pyproject.toml").read_text()
    (tmp_path / "pyproject.toml").write_text(text)
    subprocess.run([sys.executable, "-c", command], cwd=tmp_path, check=True)
    project = tomllib.loads(text)["project"]
    served = set((tmp_path / "serve.txt").read_text().splitlines())
    left_out = set(project["dependencies"]) - served
    assert [line.split(">")[0] for line in left_out] == ["torch"]
    assert served - set(project["dependencies"]) == set(project["optional-dependencies"]["otel"])
    assert (tmp_path / "train.txt").read_text().splitlines() == project["optional-dependencies"]["train"]


def test_the_service_needs_no_torch_on_a_cpu() -> None:
    program = """
import sys
sys.modules["torch"] = None
import app.application
from app import engines
from app.model import weights
print(engines.load(weights.load(weights.BUNDLED), "cpu").name)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout == "openvino\n", done.stderr


def test_hadolint_finds_nothing() -> None:
    hadolint = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or "hadolint"
    done = subprocess.run([hadolint, ROOT / "Dockerfile"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_the_version_is_the_same_everywhere() -> None:
    assert f'image.version="{__version__}"' in DOCKERFILE
    images = [service["image"] for service in compose().values() if "build" in service]
    assert images == [f"thirtytwo:{__version__}", f"thirtytwo-train:{__version__}"]
    assert compose("docker-compose.cpu.yml")["thirtytwo"]["image"] == f"thirtytwo:{__version__}-cpu"


def test_our_services_are_locked_down_and_reserve_a_gpu_unless_told_otherwise() -> None:
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


def test_a_stop_has_time_to_answer_what_was_accepted() -> None:
    assert seconds(compose()["thirtytwo"]["stop_grace_period"]) > Settings().shutdown_timeout_s


def test_only_the_service_is_reached_from_outside() -> None:
    ports = {name: service["ports"] for name, service in compose().items() if "ports" in service}
    assert ports.pop("thirtytwo") == ["8000:8000"]
    assert all(port.startswith("127.0.0.1:") for published in ports.values() for port in published)


def test_what_the_document_names_exists() -> None:
    document = (ROOT / "docs" / "deployment.md").read_text()
    paths = set(re.findall(r"(?:deploy/[\w./-]+|docker-compose[\w.]*\.yml)", document))
    assert len(paths) >= 5
    assert [path for path in paths if not (ROOT / path.rstrip(".")).exists()] == []
    assert set(re.findall(r"\d+\.\d+\.\d+", document)) == {__version__}
    variables = set(re.findall(r"^\| `([A-Z_]+)` \|", document, re.MULTILINE))
    ours = {name for name in variables if not name.startswith("OTEL_")}
    assert ours == set(re.findall(r"\$\{(\w+):-", (ROOT / "docker-compose.yml").read_text()))
