import tempfile

import pytest

from app.commands.serve import choose_workers
from app.engines.hardware import available_cpus
from app.settings import Settings


def no_directory() -> str:
    raise FileNotFoundError


def test_default_workers_need_a_temporary_directory(caplog: pytest.LogCaptureFixture) -> None:
    settings = Settings(device="cuda")
    expected = max(1, min(16, available_cpus() * 3 // 4))
    assert choose_workers(settings, tempfile.gettempdir) == expected
    assert choose_workers(settings, no_directory) == 1
    if expected > 1:
        assert "one HTTP process" in caplog.text


def test_given_workers_are_kept() -> None:
    assert choose_workers(Settings(workers=3), no_directory) == 3
    assert choose_workers(Settings(device="cpu"), no_directory) == 1
