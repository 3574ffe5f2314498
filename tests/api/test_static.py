"""Static files."""

import subprocess
import sys
from pathlib import Path

import pytest

FIRST_REQUEST = """
import mimetypes, sys
import httpx
from app.settings import Settings
from tests.conftest import serving

with serving(Settings(weights=sys.argv[1])) as client:
    client.get("/healthz")
    before = set(sys.modules)
    assert mimetypes.inited
    assert client.get("/static/index.css").status_code == 200
    print(*sorted(set(sys.modules) - before))
"""


@pytest.mark.slow
def test_first_static_file_loads_no_module(tiny_weights: Path) -> None:
    """Imports, and the system's table of media types, hold the event loop for 15 ms."""
    command = [sys.executable, "-c", FIRST_REQUEST, str(tiny_weights)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True)
    assert ended.stdout.split() == []
