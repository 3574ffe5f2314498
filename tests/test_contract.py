"""What the contract and the documents promise is found in code and README, and the other way round."""

import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import httpx
import pytest

from app.api import routes
from app.application import create_api
from app.errors import RequestError
from app.settings import PREFIX, Settings
from scripts import settings_table

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
API = (ROOT / "docs" / "api.md").read_text()
CONFIGURATION = (ROOT / "docs" / "configuration.md").read_text()
PLAYWRIGHT = find_spec("playwright")
NODE = Path(PLAYWRIGHT.origin or "").parent / "driver" / "node" if PLAYWRIGHT else None

SETTINGS = {
    "WEIGHTS",
    "DEVICE",
    "MAX_BATCH",
    "MAX_QUEUE",
    "REQUEST_TIMEOUT_S",
    "MAX_FILES",
    "MAX_FILE_BYTES",
    "MAX_BODY_BYTES",
    "MAX_PIXELS",
    "STRICT_SIZE",
    "API_KEYS",
    "LOG_FORMAT",
    "THREADS",
    "ROOT_PATH",
}
ROUTES = {"/predict", "/model", "/healthz", "/readyz", "/metrics", "/docs", "/openapi.json", "/"}
STATUSES = {400, 401, 413, 415, 422, 429, 499, 503, 504}
HTTP_STATUSES = {408, 414, 431}  # of HTTP itself, for requests that no route sees


def test_every_promised_setting_exists() -> None:
    assert {name.upper() for name in Settings.model_fields} >= SETTINGS


def test_configuration_page_lists_every_setting() -> None:
    assert settings_table.updated(CONFIGURATION) == CONFIGURATION, "run make docs"
    assert all(f"`{PREFIX}{name.upper()}`" in CONFIGURATION for name in Settings.model_fields)


def test_every_promised_route_exists() -> None:
    routers = (create_api(Settings()), routes.router, routes.docs_router, routes.metrics_router, routes.page_router)
    assert {getattr(route, "path", "") for router in routers for route in router.routes} >= ROUTES


def test_every_promised_status_has_an_error() -> None:
    kinds = RequestError.__subclasses__()
    assert {kind.status for kind in kinds} == STATUSES | HTTP_STATUSES
    assert len({kind.type for kind in kinds}) == len(kinds)


def test_make_targets_exist() -> None:
    listed = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert {line.split()[0] for line in listed.splitlines()} >= {"serve", "test", "test-fast", "train", "bench", "lint"}


def assert_alike(got: str, said: str) -> None:
    """The same but for the last digits of probabilities, which depend on the processor."""
    probability = re.compile(r"0\.\d+")
    assert probability.sub("p", got) == probability.sub("p", said)
    assert list(map(float, probability.findall(got))) == pytest.approx(
        list(map(float, probability.findall(said))), abs=0.005
    )


@pytest.mark.slow
def test_readme_curl_prints_the_documented_response(bundled: httpx.Client) -> None:
    command, answer = re.search(r"```console\n\$ (curl .*?)\n(\{.*?\})\n```", README, re.DOTALL).groups()
    file, url = re.fullmatch(r"curl -F file=@(\S+) localhost:8000(\S+)", command).groups()
    response = bundled.post(url, files={"file": (Path(file).name, (ROOT / file).read_bytes())})
    assert_alike(response.text, answer)


@pytest.mark.parametrize(
    ("language", "interpreter", "suffix"),
    [
        ("python", Path(sys.executable), "py"),
        pytest.param(
            "javascript", NODE, "mjs", marks=pytest.mark.skipif(not NODE, reason="needs node, which playwright has")
        ),
    ],
)
def test_api_page_programs_print_the_documented_line(
    bundled: httpx.Client, tmp_path: Path, language: str, interpreter: Path, suffix: str
) -> None:
    (program,) = re.findall(rf"```{language}\n(.*?)```", API, re.DOTALL)
    (printed,) = re.findall(r"^Both print `(.*?)`\.", API, re.MULTILINE)
    address = f"http://127.0.0.1:{bundled.base_url.port}"
    (tmp_path / f"program.{suffix}").write_text(program.replace("http://localhost:8000", address))
    command = [interpreter, tmp_path / f"program.{suffix}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert_alike(done.stdout, f"{printed}\n")
    assert done.stderr == ""
