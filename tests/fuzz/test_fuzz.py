"""Short runs of `make fuzz`."""

import re
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec

import httpx
import pytest

from tests.fuzz.api import fuzz

pytestmark = pytest.mark.e2e


@pytest.mark.skipif(
    find_spec("atheris") is None, reason="needs the extra fuzz; atheris exists for Linux on x86-64 only"
)
def test_guided_fuzzer_finds_no_crash_in_the_decoder() -> None:
    command = [sys.executable, "-m", "tests.fuzz.decoding", "-runs=500", "-max_len=4096", "-seed=1"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=250, check=False)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert "Done 500 runs" in ended.stderr


@pytest.mark.skipif(find_spec("schemathesis") is None, reason="needs the extra fuzz")
def test_schemathesis_finds_no_undocumented_response(start: Callable[..., httpx.Client]) -> None:
    client = start(max_batch=1, log_level="error")
    ended = fuzz(str(client.base_url), "--max-examples=5", "--seed=1")
    assert ended.returncode == 0, ended.stdout[-5000:]
    assert int(re.search(r"(\d+) generated", ended.stdout)[1]) > 50
