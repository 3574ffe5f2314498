"""The flags of `python -m app`, in this process."""

import pytest

from app.commands import cli
from app.errors import SettingsError
from app.settings import DEPRECATED, Settings


def test_flag_has_precedence_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THIRTYTWO_PORT", "8000")
    monkeypatch.setenv("THIRTYTWO_MAX_BATCH", "7")
    loaded, _ = cli.parse(["--port", "9", "--log-level", "DEBUG"])
    assert (loaded.port, loaded.max_batch, loaded.log_level) == (9, 7, "debug")


def test_lists_are_split_and_may_be_repeated() -> None:
    loaded, _ = cli.parse(["--allowed-hosts", "a.org,b.org", "--allowed-hosts=c.org", "--strict-size", "true"])
    assert loaded.allowed_hosts == ("a.org", "b.org", "c.org")
    assert loaded.strict_size


@pytest.mark.parametrize("key", ['k"ey[1]{', "null", "[1]", '"quoted"', "x=y", "007", "back\\slash"])
def test_keys_are_passed_unchanged(key: str) -> None:
    assert [secret.get_secret_value() for secret in cli.parse(["--api-keys", key])[0].api_keys] == [key]


def test_empty_flag_is_the_default() -> None:
    assert cli.parse(["--port", "", "--root-path", "", "--api-keys="])[0] == Settings()


def test_wrong_value_of_a_flag_names_the_variable() -> None:
    with pytest.raises(SettingsError, match=r"^THIRTYTWO_PORT: Input should be a valid integer"):
        cli.parse(["--port", "x"])


def test_deprecated_flags_are_replaced_with_a_warning() -> None:
    loaded, warnings = cli.parse(["--drain-s", "3", "--watchdog-s=4", "--port", "1"])
    assert (loaded.shutdown_timeout_s, loaded.inference_timeout_s, loaded.port) == (3, 4, 1)
    assert warnings == [
        "--drain-s is deprecated; use --shutdown-timeout-s",
        "--watchdog-s is deprecated; use --inference-timeout-s",
    ]


def test_removed_flag_is_dropped_with_a_warning() -> None:
    loaded, warnings = cli.parse(["--second-look", "0", "--port", "9", "--second-look=1"])
    assert loaded.port == 9
    assert len(warnings) == 2
    assert warnings[0].startswith("--second-look has no effect: ")


def test_new_flag_has_precedence_over_deprecated() -> None:
    loaded, warnings = cli.parse(["--shutdown-timeout-s", "5", "--drain-s", "3"])
    assert loaded.shutdown_timeout_s == 5
    assert "both are given, --shutdown-timeout-s has precedence" in warnings[0]


@pytest.mark.parametrize("arguments", [["--nope", "1"], ["--port"], ["x"]])
def test_unknown_argument_exits_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.parse(arguments)
    assert len(capsys.readouterr().err.splitlines()) == 2


def test_help_has_groups_choices_defaults_and_variables(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        cli.parse(["--help"])
    text = capsys.readouterr().out
    joined = "".join(text.split())
    assert "--log-level {debug,info,warning,error}" in text
    assert "Limits:\n" in text
    for name, field in Settings.model_fields.items():
        assert f"--{name.replace('_', '-')} " in text
        assert "".join((field.description or "").split()) in joined
        assert f"[THIRTYTWO_{name.upper()}" in text
    assert "[THIRTYTWO_PORT=8000]" in text
    assert not any(f"--{old.lower().replace('_', '-')} " in text for old in DEPRECATED)
