import pytest

from app import settings
from app.errors import SettingsError
from app.settings import Settings


def test_defaults_need_no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("THIRTYTWO_PORT", raising=False)
    loaded = settings.load()
    assert loaded.port == 8000
    assert loaded.api_keys == ()


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("MAX_BATCH", "0"),
        ("MAX_QUEUE", "many"),
        ("REQUEST_TIMEOUT_S", "-1"),
        ("DEVICE", "toaster"),
        ("STRICT_SIZE", "perhaps"),
        ("LOG_FORMAT", "xml"),
        ("LOG_LEVEL", "loud"),
        ("PORT", "70000"),
        ("THREADS", "-2"),
    ],
)
def test_a_wrong_value_is_one_line_that_names_the_variable(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    monkeypatch.setenv(f"THIRTYTWO_{variable}", value)
    with pytest.raises(SettingsError) as error:
        settings.load()
    assert str(error.value).startswith(f"THIRTYTWO_{variable}: ")
    assert "\n" not in str(error.value)


def test_a_queue_too_small_for_one_request_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THIRTYTWO_MAX_QUEUE", "10")
    with pytest.raises(SettingsError, match=r"MAX_QUEUE \(10\) must hold one request of MAX_FILES"):
        settings.load()


def test_too_little_room_for_one_body_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THIRTYTWO_MAX_HELD_BYTES", "10")
    with pytest.raises(SettingsError, match=r"MAX_HELD_BYTES \(10\) must hold MAX_BODY_BYTES"):
        settings.load()


def test_keys_are_split_and_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THIRTYTWO_API_KEYS", "first-key, second-key,")
    loaded = settings.load()
    assert [key.get_secret_value() for key in loaded.api_keys] == ["first-key", "second-key"]
    assert "first-key" not in repr(loaded)


@pytest.mark.parametrize(("given", "kept"), [("", ""), ("/", ""), ("x/y/", "/x/y"), ("/x", "/x")])
def test_root_path_has_one_leading_slash(given: str, kept: str) -> None:
    assert Settings(root_path=given).root_path == kept


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Settings().port = 1
