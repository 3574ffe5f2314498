from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from app import settings
from app.errors import SettingsError
from app.settings import DEPRECATED, PREFIX, Settings


def refused(monkeypatch: pytest.MonkeyPatch, variable: str, value: str) -> str:
    monkeypatch.setenv(PREFIX + variable, value)
    with pytest.raises(SettingsError) as error:
        settings.load()
    assert "\n" not in str(error.value)
    return str(error.value)


def test_defaults_need_no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("THIRTYTWO_PORT", raising=False)
    loaded = settings.load()
    assert loaded.port == 8000
    assert loaded.api_keys == ()


@pytest.mark.parametrize(
    ("variable", "value", "reason"),
    [
        ("MAX_BATCH", "-1", "greater than or equal to 0"),
        ("MAX_QUEUE", "many", "valid integer"),
        ("REQUEST_TIMEOUT_S", "-1", "greater than 0"),
        ("REQUEST_TIMEOUT_S", "inf", "finite"),
        ("WORKERS", "100000", "less than or equal to 256"),
        ("MAX_BATCH", "99999999999999999999", "less than or equal to 65536"),
        ("SHUTDOWN_TIMEOUT_S", "nan", "finite"),
        ("DEVICE", "toaster", "must be auto, cpu, cuda, cuda:N or mps"),
        ("DEVICE", "cuda:x", "must be auto, cpu, cuda, cuda:N or mps"),
        ("STRICT_SIZE", "perhaps", "valid boolean"),
        ("LOG_FORMAT", "xml", "'text' or 'json'"),
        ("LOG_LEVEL", "loud", "'debug', 'info', 'warning' or 'error'"),
        ("PORT", "70000", "less than or equal to 65535"),
        ("THREADS", "-2", "greater than or equal to 0"),
        ("HOST", " ", "must not be empty"),
        ("ROOT_PATH", "/v2/x", "begins with a path of the service itself"),
        ("TLS_KEY", "/nowhere", "Path does not point to a file"),
        ("ALLOWED_HOSTS", "a.org:8000", "without scheme, port and path"),
        ("ALLOWED_HOSTS", "https://a.org", "without scheme, port and path"),
        ("ALLOWED_HOSTS", "a.*.org", "without scheme, port and path"),
        ("CORS_ORIGINS", "https://a.org/app", "without a path"),
        ("CORS_ORIGINS", "a.org", "must be SCHEME://HOST"),
        ("CORS_ORIGINS", "https://[::1", "must be SCHEME://HOST"),
        ("TRUSTED_PROXIES", "proxy.local", "must be an IP address"),
        ("TRUSTED_PROXIES", "10.0.0.1/8", "must be an IP address"),
    ],
)
def test_wrong_value_is_one_line_naming_the_variable(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, reason: str
) -> None:
    line = refused(monkeypatch, variable, value)
    assert line.startswith(f"THIRTYTWO_{variable}: ")
    assert reason in line
    assert "^" not in line  # no regular expression


@pytest.mark.parametrize(
    ("variable", "value", "limit"),
    [
        ("MAX_QUEUE", "10", "MAX_FILES=256"),
        ("MAX_INFLIGHT_BYTES", "10", "MAX_BODY_BYTES=32000000"),
        ("MAX_REQUEST_PIXELS", "10", "MAX_PIXELS=25000000"),
    ],
)
def test_shared_limit_below_single_one_is_refused(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, limit: str
) -> None:
    assert refused(monkeypatch, variable, value) == f"THIRTYTWO_{variable} is less than THIRTYTWO_{limit}"


def test_certificate_without_key_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "cert.pem"
    file.touch()
    assert refused(monkeypatch, "TLS_CERT", str(file)).startswith("THIRTYTWO_TLS_KEY is missing")


@pytest.mark.parametrize(
    ("variable", "value", "expected"),
    [
        ("LOG_LEVEL", "INFO", "info"),
        ("LOG_FORMAT", "Json", "json"),
        ("DEVICE", "CPU", "cpu"),
        ("DEVICE", "CUDA:1", "cuda:1"),
        ("ENGINE", " OpenVINO ", "openvino"),
        ("PRECISION", "INT8", "int8"),
        ("HOST", "[::1]", "::1"),
        ("ALLOWED_HOSTS", "A.org, *.B.org", ("a.org", "*.b.org")),
        ("ALLOWED_HOSTS", "::1,[::0001]", ("[::1]", "[::1]")),
        ("ALLOWED_HOSTS", "*", ("*",)),
        ("CORS_ORIGINS", "https://A.org/,http://b:80", ("https://a.org", "http://b")),
        ("CORS_ORIGINS", "https://a.org:443,https://[::1]:8443", ("https://a.org", "https://[::1]:8443")),
        ("CORS_ORIGINS", "*", ("*",)),
        ("TRUSTED_PROXIES", "10.0.0.0/8, ::1", ("10.0.0.0/8", "::1")),
    ],
)
def test_equivalent_spellings_are_normalised(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, expected: object
) -> None:
    monkeypatch.setenv(PREFIX + variable, value)
    assert getattr(settings.load(), variable.lower()) == expected


@pytest.mark.slow
@given(st.text(max_size=30))
def test_any_list_value_is_accepted_or_one_line(value: str) -> None:
    for field in ("cors_origins", "allowed_hosts", "trusted_proxies", "root_path", "device", "host"):
        line = ""
        try:
            Settings(**{field: value})
        except ValidationError as error:
            line = str(settings.invalid(error))
        assert not line or line.startswith(PREFIX + field.upper())


def test_deprecated_name_sets_the_new_setting(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for old in DEPRECATED:
        monkeypatch.setenv(PREFIX + old, "")
    monkeypatch.setenv("THIRTYTWO_DRAIN_S", "3")
    monkeypatch.setenv("THIRTYTWO_PROXIES", "10.0.0.1,10.0.0.2")
    loaded = settings.load()
    assert loaded.shutdown_timeout_s == 3
    assert loaded.trusted_proxies == ("10.0.0.1", "10.0.0.2")
    assert caplog.messages == [
        "THIRTYTWO_PROXIES is deprecated; use THIRTYTWO_TRUSTED_PROXIES",
        "THIRTYTWO_DRAIN_S is deprecated; use THIRTYTWO_SHUTDOWN_TIMEOUT_S",
    ]


def test_new_name_has_precedence_over_deprecated(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("THIRTYTWO_WATCHDOG_S", "3")
    monkeypatch.setenv("THIRTYTWO_INFERENCE_TIMEOUT_S", "4")
    assert settings.load().inference_timeout_s == 4
    assert "both are set, THIRTYTWO_INFERENCE_TIMEOUT_S has precedence" in caplog.text


def test_wrong_value_names_the_deprecated_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    assert refused(monkeypatch, "DRAIN_S", "x").startswith("THIRTYTWO_DRAIN_S: ")


def test_removed_variable_is_warned_about() -> None:
    (line,) = settings.warnings({"THIRTYTWO_SECOND_LOOK": "0"})
    assert line.startswith("THIRTYTWO_SECOND_LOOK has no effect: ")


def test_misspelt_variable_is_warned_about() -> None:
    environment = {"THIRTYTWO_MAX_BATHC": "1", "THIRTYTWO_PORT_8000_TCP_ADDR": "10.0.0.1", "THIRTYTWO_PORT": "1"}
    assert settings.warnings(environment) == ["THIRTYTWO_MAX_BATHC is not a setting; did you mean THIRTYTWO_MAX_BATCH?"]


def test_keys_are_split_and_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THIRTYTWO_API_KEYS", "first-key, second-key,")
    loaded = settings.load()
    assert [key.get_secret_value() for key in loaded.api_keys] == ["first-key", "second-key"]
    assert "first-key" not in repr(loaded)


@pytest.mark.parametrize(("given", "kept"), [("", ""), ("/", ""), ("x/y/", "/x/y"), ("/x", "/x"), (" /x ", "/x")])
def test_root_path_has_one_leading_slash(given: str, kept: str) -> None:
    assert Settings(root_path=given).root_path == kept


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Settings().port = 1
