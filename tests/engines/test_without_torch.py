"""The base install has no torch: the service runs on OpenVINO, and an error names the extra where that cannot."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from app.model import weights
from tests.conftest import EXAMPLES

# An import of a module that is None in sys.modules fails, and find_spec does not find it.
PROGRAM = """
import sys
sys.modules["torch"] = None
from app.__main__ import main
sys.argv[0] = "python -m app"
main()
"""


def classify(picture: Path, **settings: str | Path) -> subprocess.CompletedProcess[str]:
    """`python -m app classify PICTURE` without torch."""
    environment = {f"THIRTYTWO_{name.upper()}": str(value) for name, value in settings.items()}
    command = [sys.executable, "-c", PROGRAM, "classify", str(picture)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **environment})


@pytest.fixture
def lenet_weights(tiny_weights: Path, tmp_path: Path) -> Path:
    """A file whose architecture OpenVINO does not support."""
    tiny = weights.load(tiny_weights)
    path = tmp_path / "lenet.safetensors"
    card = tiny.card.model_copy(update={"architecture": "lenet", "arguments": {"classes": 10}})
    weights.save(path, card, tiny.state, tiny.reference_images, tiny.reference_probabilities)
    return path


@pytest.mark.slow
def test_convnet_is_served_without_torch(tiny_weights: Path) -> None:
    done = classify(EXAMPLES / "cat.png", weights=tiny_weights)
    assert done.returncode == 0, done.stderr
    assert "cat.png" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_error_names_the_extra_that_has_torch(lenet_weights: Path, device: str) -> None:
    done = classify(EXAMPLES / "cat.png", weights=lenet_weights, device=device)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "pip install '.[cuda]'" in line
