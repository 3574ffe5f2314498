"""What a service of the test process has logged."""

import pytest

from app.telemetry import log_stream
from tests.support.raw_http import TIMEOUT_S


def read(capfd: pytest.CaptureFixture[str]) -> str:
    """All text on stderr since the last call. While the service writes, pytest's capture loses lines."""
    log_stream.stderr().drain(TIMEOUT_S)
    return capfd.readouterr().err
