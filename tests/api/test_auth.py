"""API keys: headers, key files, reloads."""

import os
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.api.auth import ApiKeys, parse_keys
from app.errors import RateLimited, SettingsError, Unauthorized

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
    assert [key.secret for key in parse_keys(data)] == keys


@given(st.lists(st.from_regex(rb"[!-~]{1,20}", fullmatch=True).filter(lambda key: not key.startswith(b"#"))))
def test_keys_of_any_file_are_read_back(keys: list[bytes]) -> None:
    assert [key.secret for key in parse_keys(b"\n".join(keys))] == keys


def test_a_line_may_have_a_name_and_a_limit() -> None:
    keys = parse_keys(b"plain\nnamed shop\nlimited mobile-app 2.5 10 # per second and burst\n")
    assert [(key.secret, key.name) for key in keys] == [
        (b"plain", ""),
        (b"named", "shop"),
        (b"limited", "mobile-app"),
    ]
    assert [key.limit and (key.limit.rate, key.limit.burst) for key in keys] == [None, None, (2.5, 10)]
    assert "plain" not in repr(keys)


@pytest.mark.parametrize(
    "line",
    [
        "k n 5",
        "k n 0 5",
        "k n -1 5",
        "k n nan 5",
        "k n inf 5",
        "k n 5 0",
        "k n 5 1.5",
        "k n 5 5 5",
        "k n 1e-320 9",
        "k {x}",
    ],
)
def test_a_wrong_line_is_named_without_its_key(tmp_path: Path, line: str, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "keys"
    file.write_text(f"first\nsecret-{line}")
    with pytest.raises(SettingsError, match="line 2: a") as refused:
        ApiKeys([], file)
    assert "secret" not in str(refused.value)
    file.write_text("first\n")
    keys = ApiKeys([], file)
    file.write_text(f"first\nsecret-{line}")
    for _ in range(3):
        keys.reload(at_once=False)
    assert accepts(keys, "first")
    assert not accepts(keys, "secret-k")
    assert sum("line 2" in message for message in caplog.messages) == 1
    assert "secret" not in caplog.text


def test_a_reload_keeps_what_is_left_of_a_limit(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("key app 0.001 5\n")
    keys = ApiKeys([], file)
    keys.check({b"x-api-key": b"key"}).limit.take(5)
    file.write_text("key app 0.001 5\nother\n")
    keys.reload()
    with pytest.raises(RateLimited):
        keys.check({b"x-api-key": b"key"}).limit.take(1)
    file.write_text("key app 0.001 6\n")
    keys.reload()
    keys.check({b"x-api-key": b"key"}).limit.take(6)


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


def test_cpu_time_does_not_grow_with_the_number_of_keys(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("\n".join(f"{number:032}" for number in range(20_000)))
    keys = ApiKeys([], file)
    start = time.thread_time()
    for _ in range(100):
        assert accepts(keys, f"{19_999:032}")
        assert not accepts(keys, "other")
    assert time.thread_time() - start < 0.2  # 0.001; a comparison with each key takes 2 s
    file.write_text("\n".join(f"{number:032}" for number in range(1, 20_001)))
    start = time.thread_time()
    keys.reload()
    assert time.thread_time() - start < 3  # 0.1; a comparison of each pair of keys takes 60 s
    assert not accepts(keys, f"{0:032}")
    assert accepts(keys, f"{20_000:032}")


def test_first_of_two_lines_with_one_key_is_in_effect(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("key first\nkey second\n")
    keys = ApiKeys([], file)
    keys.reload()
    found = keys.check({b"x-api-key": b"key"})
    assert found
    assert found.name == "first"


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


@pytest.mark.slow
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
