from pathlib import Path

import pytest

from app.commands.serve import choose_workers
from app.errors import SettingsError
from app.settings import Settings


def no_directory() -> str:
    raise FileNotFoundError


def test_default_workers_need_a_temporary_directory(caplog: pytest.LogCaptureFixture) -> None:
    settings = Settings(device="cuda")
    assert choose_workers(settings, 16, lambda: "/tmp") == 12  # noqa: S108
    assert choose_workers(settings, 16, no_directory) == 1
    assert "one HTTP process" in caplog.text


def test_shadow_has_one_process(caplog: pytest.LogCaptureFixture) -> None:
    shadow = Path("candidate.safetensors")
    assert choose_workers(Settings(device="cuda", shadow_weights=shadow), 16) == 1
    assert "SHADOW_WEIGHTS" in caplog.text
    with pytest.raises(SettingsError, match="needs one HTTP process"):
        choose_workers(Settings(device="cuda", shadow_weights=shadow, workers=2), 16)


def test_given_workers_are_kept() -> None:
    assert choose_workers(Settings(workers=3), 16, no_directory) == 3
    assert choose_workers(Settings(device="cpu"), 16, no_directory) == 1
