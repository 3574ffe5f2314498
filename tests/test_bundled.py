"""The bundled weights: what the card says is what is served."""

import io
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from PIL import Image

from app.model import weights
from app.model.weights import BUNDLED
from tests.conftest import CLASSES, EXAMPLES

DATA = os.environ.get("THIRTYTWO_TEST_DATA")


def test_bundled_card_is_complete() -> None:
    card = weights.load(BUNDLED).card
    assert BUNDLED.stat().st_size < 12_000_000
    assert card.classes == CLASSES
    assert card.test_accuracy >= 0.95
    assert card.dataset == "CIFAR-10"
    assert len(card.stages) > 1
    assert card.results["test_stage_shares"][0] == 1.0


def test_most_examples_are_recognised(bundled: httpx.Client) -> None:
    files = [("file", (f"{name}.png", (EXAMPLES / f"{name}.png").read_bytes())) for name in CLASSES]
    predictions = bundled.post("/predict", files=files).json()["predictions"]
    assert sum(p["label"] == name for p, name in zip(predictions, CLASSES, strict=True)) >= 8


def accuracy_over_http(client: httpx.Client, kind: str, **options: object) -> float:
    """Of all test images, uploaded as files of this format."""
    from training import data

    test = data.load(Path(DATA or ""), 32, ["test"]).test

    def hits(start: int) -> int:
        files = []
        for image in test.images[start : start + 100].numpy():
            buffer = io.BytesIO()
            Image.fromarray(image).save(buffer, kind, **options)
            files.append(("file", ("x", buffer.getvalue())))
        labels = [CLASSES[i] for i in test.labels[start : start + 100]]
        predictions = client.post("/predict", files=files).json()["predictions"]
        return sum(p["label"] == label for p, label in zip(predictions, labels, strict=True))

    with ThreadPoolExecutor(2) as pool:  # more would exceed one caller's share of the queue
        return sum(pool.map(hits, range(0, 10_000, 100))) / 10_000


@pytest.mark.slow
@pytest.mark.skipif(not DATA, reason="THIRTYTWO_TEST_DATA names no CIFAR-10 folder")
def test_test_images_over_http_agree_with_the_card(bundled: httpx.Client) -> None:
    assert accuracy_over_http(bundled, "PNG") == pytest.approx(weights.load(BUNDLED).card.test_accuracy, abs=1e-3)


@pytest.mark.slow
@pytest.mark.skipif(not DATA, reason="THIRTYTWO_TEST_DATA names no CIFAR-10 folder")
def test_jpeg_test_images_over_http_agree_with_the_card(bundled: httpx.Client) -> None:
    accuracy = accuracy_over_http(bundled, "JPEG", quality=80, subsampling="4:2:0")
    assert accuracy == pytest.approx(weights.load(BUNDLED).card.results["test_jpeg80_accuracy"], abs=1e-3)
    assert accuracy >= 0.9375
