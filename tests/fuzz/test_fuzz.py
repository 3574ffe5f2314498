"""Short rounds of what `make fuzz` does at length."""

import re
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec

import httpx
import pytest

from tests.fuzz.api import fuzz


@pytest.mark.skipif(find_spec("atheris") is None, reason="atheris is there for Linux on x86-64 only")
@pytest.mark.timeout(300)
def test_no_file_that_the_guided_fuzzer_makes_breaks_the_decoder() -> None:
    command = [sys.executable, "-m", "tests.fuzz.decoding", "-runs=500", "-max_len=4096", "-seed=1"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=250, check=False)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert "Done 500 runs" in ended.stderr


@pytest.mark.timeout(300)
def test_no_request_that_the_schema_allows_or_forbids_gets_what_it_does_not_tell(
    start: Callable[..., httpx.Client],
) -> None:
    client = start(max_batch=1, log_level="error")
    ended = fuzz(str(client.base_url), "--max-examples=5", "--seed=1")
    assert ended.returncode == 0, ended.stdout[-5000:]
    assert int(re.search(r"(\d+) generated", ended.stdout)[1]) > 50
