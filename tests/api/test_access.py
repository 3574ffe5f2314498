"""Access: hosts, root path, origins, disabled parts, secrets."""

import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from app.settings import Settings
from tests.conftest import serving
from tests.support.subprocesses import command, free_port

Start = Callable[..., httpx.Client]
PNG = {"content-type": "image/png"}


@pytest.mark.slow
def test_only_allowed_hosts_are_served(start: Start) -> None:
    client = start(allowed_hosts="a.org, *.b.org, ::1")
    for host in ("a.org", "A.org:8000", "x.b.org", "y.x.b.org:1", "[::1]:80"):
        assert client.get("/model", headers={"host": host}).status_code == 200, host
    for host in ("b.org", "evil.org", "a.org.evil.org", "[::2]:80", "127.0.0.1", "a.org:x", ""):
        response = client.get("/model", headers={"host": host})
        assert response.status_code == 400, host
        assert response.json()["type"] == "urn:thirtytwo:problem:unknown-host"


def test_probes_by_address_pass_the_host_check(start: Start) -> None:
    client = start(allowed_hosts="a.org", root_path="/x")
    for path in ("/healthz", "/readyz", "/metrics", "/v2/health/live", "/v2/health/ready"):
        for prefix in ("", "/x"):
            assert client.get(prefix + path, headers={"host": "10.0.0.7:8000"}).status_code == 200, path
    assert client.get("/model", headers={"host": "10.0.0.7:8000"}).status_code == 400


def test_star_allows_every_host(start: Start) -> None:
    assert start(allowed_hosts="*").get("/model", headers={"host": "evil.org"}).status_code == 200


def test_root_path_works_stripped_and_not_stripped(start: Start, cat: bytes) -> None:
    client = start(root_path="/class ifier")
    for prefix in ("", "/class%20ifier"):
        assert client.post(f"{prefix}/predict", content=cat, headers=PNG).status_code == 200
        assert client.get(f"{prefix}/v2/models/tiny").status_code == 200
        assert client.get(f"{prefix}/").status_code == 200
        assert client.get(f"{prefix}/static/app.js").status_code == client.get("/static/app.js").status_code
        assert client.get(f"{prefix}/nothing").status_code == 404
    assert client.get("/class%20ifier2/model").status_code == 404


@pytest.mark.slow
def test_cors_allows_only_the_named_origins(start: Start, cat: bytes) -> None:
    closed = start().post("/predict", content=cat, headers=PNG | {"origin": "https://a.org"})
    assert "access-control-allow-origin" not in closed.headers
    client = start(cors_origins="https://a.org")
    answer = client.post("/predict", content=cat, headers=PNG | {"origin": "https://a.org"})
    assert answer.headers["access-control-allow-origin"] == "https://a.org"
    other = client.post("/predict", content=cat, headers=PNG | {"origin": "https://b.org"})
    assert "access-control-allow-origin" not in other.headers
    asked = {"origin": "https://a.org", "access-control-request-method": "POST"}
    assert client.options("/predict", headers=asked).status_code == 200


@pytest.mark.parametrize(
    ("setting", "paths"),
    [("expose_docs", ["/docs", "/openapi.json"]), ("expose_metrics", ["/metrics"]), ("expose_ui", ["/"])],
)
def test_docs_metrics_and_ui_can_be_disabled(start: Start, cat: bytes, setting: str, paths: list[str]) -> None:
    client = start(**{setting: False})
    for path in ("/docs", "/openapi.json", "/metrics", "/", "/healthz", "/model"):
        assert client.get(path).status_code == (404 if path in paths else 200), path
    assert client.post("/predict", content=cat, headers=PNG).status_code == 200


@pytest.mark.slow
def test_uploads_leave_no_trace(tmp_path: Path, tiny_weights: Path, cat: bytes) -> None:
    """Neither picture nor name nor key reaches the disk or the log, not even where reading them fails."""
    port, home = free_port(), tmp_path / "home"
    home.mkdir()
    environment = {"PATH": os.environ["PATH"], "HOME": str(home), "TMPDIR": str(home)}
    environment["THIRTYTWO_API_KEYS"] = "secret-key"
    log = tmp_path / "log"
    with (
        log.open("w") as stream,
        subprocess.Popen(
            command("--weights", str(tiny_weights), "--port", str(port), "--log-level", "debug"),
            stderr=stream, env=environment,
        ) as running,
        httpx.Client(base_url=f"http://127.0.0.1:{port}", headers={"x-api-key": "secret-key"}) as client,
    ):  # fmt: skip
        deadline = time.monotonic() + 100
        while time.monotonic() < deadline:
            try:
                client.get("/readyz")
                break
            except httpx.ConnectError:
                time.sleep(0.1)
        for data in (cat, cat[:400], b"secret-content", bytes(2_000_000)):
            client.post("/predict", files={"file": ("secret-name.png", data)}, params={"q": "secret-query"})
            client.post("/predict", content=data, headers=PNG)
            client.post("/predict", content=data, headers=PNG | {"x-api-key": "wrong-secret"})
        running.terminate()
        running.wait(20)
    assert "secret" not in log.read_text()
    assert [path for path in home.rglob("*") if path.is_file()] == []


def test_secrets_are_masked_where_settings_are_shown() -> None:
    assert "hidden-key" not in repr(Settings(api_keys="hidden-key"))
    assert "hidden-key" not in Settings(api_keys="hidden-key").model_dump_json()


def test_service_without_keys_logs_a_warning(tiny_weights: Path, caplog: pytest.LogCaptureFixture) -> None:
    with serving(Settings(weights=tiny_weights, max_batch=1)):
        assert "no API keys are set" in caplog.text
    caplog.clear()
    with serving(Settings(weights=tiny_weights, max_batch=1, api_keys="x")):
        assert "no API keys are set" not in caplog.text
