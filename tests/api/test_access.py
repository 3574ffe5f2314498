"""Who gets in: keys, hosts, origins, closed parts, TLS."""

import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.api.auth import ApiKeys, parse_keys
from app.errors import SettingsError, Unauthorized
from app.settings import Settings
from tests.conftest import serving
from tests.support.subprocesses import command, free_port

Start = Callable[..., httpx.Client]
PNG = {"content-type": "image/png"}


def accepts(keys: ApiKeys, key: str) -> bool:
    try:
        keys.check({b"x-api-key": key.encode()})
    except Unauthorized:
        return False
    return True


def test_without_keys_all_requests_are_accepted() -> None:
    assert ApiKeys().disabled
    assert accepts(ApiKeys(), "")


@pytest.mark.parametrize(
    ("headers", "passes"),
    [
        ({b"x-api-key": b"first"}, True),
        ({b"authorization": b"Bearer second"}, True),
        ({b"authorization": b"bearer  second "}, True),
        ({b"authorization": b"Basic second", b"x-api-key": b"first"}, True),
        ({b"authorization": b"Bearer other", b"x-api-key": b"first"}, True),
        ({b"authorization": b"Bearer first", b"x-api-key": b"other"}, True),
        ({b"authorization": b"Basic second"}, False),
        ({b"authorization": b"Bearer"}, False),
        ({b"authorization": b"Bearer other", b"x-api-key": b"firs"}, False),
        ({b"x-api-key": b"firs"}, False),
        ({b"x-api-key": b"first "}, False),
        ({b"x-api-key": b"\xff"}, False),
        ({b"x-api-key": b""}, False),
        ({}, False),
    ],
)
def test_any_valid_key_in_either_header_is_accepted(headers: dict[bytes, bytes], passes: bool) -> None:
    keys = ApiKeys(["first", "second"])
    if passes:
        keys.check(headers)
    else:
        with pytest.raises(Unauthorized):
            keys.check(headers)


@pytest.mark.parametrize(
    ("data", "keys"),
    [
        (b"a\nb\n", [b"a", b"b"]),
        (b"a\r\nb", [b"a", b"b"]),
        (b"a\rb\r", [b"a", b"b"]),
        (b"\xef\xbb\xbfa\n", [b"a"]),
        (b"  a\t\n\n   \n", [b"a"]),
        (b"# comment\n  # another\na  # mine\nb#c\t#\n", [b"a", b"b#c"]),
        (b" " * 900_000, []),
        (b"", []),
    ],
)
def test_key_file_formats(data: bytes, keys: list[bytes]) -> None:
    assert parse_keys(data) == keys


@given(st.lists(st.from_regex(rb"[!-~]{1,20}", fullmatch=True).filter(lambda key: not key.startswith(b"#"))))
def test_keys_of_any_file_are_read_back(keys: list[bytes]) -> None:
    assert parse_keys(b"\n".join(keys)) == keys


def test_changed_key_file_needs_no_restart(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("old-key\n")
    status = file.stat()
    keys = ApiKeys(["fixed"], file)
    file.write_text("new-key\n")
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))  # of the same size and time, as rsync -t leaves it
    keys.reload()
    assert not accepts(keys, "old-key")
    assert accepts(keys, "new-key")
    assert accepts(keys, "fixed")


def test_half_written_key_file_is_never_in_effect(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("old-key\n")
    keys = ApiKeys([], file)
    for half in ("", "new", "new-k"):
        file.write_text(half)
        keys.reload(at_once=False)
        assert accepts(keys, "old-key")
        assert not accepts(keys, "new")
    file.write_text("new-key\n")
    keys.reload(at_once=False)
    assert accepts(keys, "old-key")
    keys.reload(at_once=False)
    assert accepts(keys, "new-key")
    assert not accepts(keys, "old-key")


def test_emptied_key_file_revokes_all_keys(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("key\n")
    keys = ApiKeys([], file)
    file.write_text("")
    for _ in range(2):
        keys.reload(at_once=False)
    assert not accepts(keys, "key")
    assert not accepts(keys, "")


def unreadable(kind: str, file: Path) -> None:
    if kind == "missing":
        return
    if kind == "FIFO":
        os.mkfifo(file)
    elif kind == "folder":
        file.mkdir()
    else:
        content = {"UTF-16": "key\n".encode("utf-16"), "huge": b"x" * 1_000_001}
        file.write_bytes(content[kind])


REASONS = {
    "missing": "cannot be read: No such file or directory",
    "FIFO": "is not a regular file",
    "folder": "is not a regular file",
    "UTF-16": "is not UTF-8 text",
    "huge": "has more than 1000000 bytes",
}


@pytest.mark.parametrize("kind", REASONS)
def test_unreadable_key_file_stops_the_start(tmp_path: Path, kind: str) -> None:
    file = tmp_path / "keys"
    unreadable(kind, file)
    with pytest.raises(SettingsError, match=f"THIRTYTWO_API_KEYS_FILE: {file} {REASONS[kind]}"):
        ApiKeys([], file)


@pytest.mark.parametrize("kind", REASONS)
def test_unreadable_key_file_keeps_the_last_keys(tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "keys"
    file.write_text("key\n")
    keys = ApiKeys([], file)
    file.unlink()
    unreadable(kind, file)
    for at_once in (False, False, True):
        keys.reload(at_once)
        assert accepts(keys, "key")
    assert [message for message in caplog.messages if REASONS[kind] in message] == caplog.messages
    assert len(caplog.messages) == 1


def test_service_rereads_the_key_file(start: Start, tmp_path: Path, cat: bytes) -> None:
    file = tmp_path / "keys"
    file.write_text("old-key")
    client = start(api_keys_file=file)

    def status(key: str) -> int:
        return client.post("/predict", content=cat, headers=PNG | {"x-api-key": key}).status_code

    assert status("old-key") == 200
    file.unlink()
    os.mkfifo(file)
    time.sleep(1.5)
    assert status("old-key") == 200
    file.unlink()
    file.write_text("new-key")
    deadline = time.monotonic() + 30
    while status("new-key") != 200:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert status("old-key") == 401


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


def test_other_origins_are_let_in_only_where_named(start: Start, cat: bytes) -> None:
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
def test_parts_can_be_closed(start: Start, cat: bytes, setting: str, paths: list[str]) -> None:
    client = start(**{setting: False})
    for path in ("/docs", "/openapi.json", "/metrics", "/", "/healthz", "/model"):
        assert client.get(path).status_code == (404 if path in paths else 200), path
    assert client.post("/predict", content=cat, headers=PNG).status_code == 200


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
        deadline = time.monotonic() + 30
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


def test_an_open_service_says_so(tiny_weights: Path, caplog: pytest.LogCaptureFixture) -> None:
    with serving(Settings(weights=tiny_weights, max_batch=1)):
        assert "no API keys are set" in caplog.text
    caplog.clear()
    with serving(Settings(weights=tiny_weights, max_batch=1, api_keys="x")):
        assert "no API keys are set" not in caplog.text
