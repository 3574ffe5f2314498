"""What /metrics tells of the work that was done."""

import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import httpx
import numpy as np
import pytest
from numpy.typing import NDArray

from app.engines import Engine, Output
from app.model.weights import Weights
from app.settings import Settings
from app.sources import load_engine
from tests.conftest import CLASSES, EXAMPLES, serving
from tests.support.images import png
from tests.support.monitoring import read_metric

Start = Callable[..., httpx.Client]

RAW = {"Inference-Header-Content-Length": "0"}
PICTURES = [(EXAMPLES / f"{name}.png").read_bytes() for name in CLASSES]


def form(*contents: bytes) -> list[tuple[str, tuple[str, bytes]]]:
    return [("file", ("x.png", content)) for content in contents]


def test_requests_are_counted_by_route_and_status(start: Start, cat: bytes) -> None:
    client = start()
    client.post("/predict", files=form(cat))
    client.get("/predict")
    for model in ("tiny_image", "tiny_image/versions/1", "tiny"):
        client.post(f"/v2/models/{model}/infer", content=cat, headers=RAW)
    client.get("/v2/models/other")
    for path in ("index.css", "swagger/swagger-ui.css", "none.css"):
        client.get(f"/static/{path}")
    client.get("/none")
    assert read_metric(client, "thirtytwo_requests_total") == {
        ("/predict", "200"): 1,
        ("/predict", "405"): 1,
        ("/v2/models/{name}/infer", "200"): 1,
        ("/v2/models/{name}/infer", "400"): 1,
        ("/v2/models/{name}/versions/{version}/infer", "200"): 1,
        ("/v2/models/{name}", "404"): 1,
        ("/static/{path}", "200"): 2,
        ("/static/{path}", "404"): 1,
        ("unmatched", "404"): 1,
    }
    assert read_metric(client, "thirtytwo_request_duration_seconds_count")[("/predict",)] == 2


def test_a_route_has_the_same_name_behind_a_root_path(start: Start, cat: bytes) -> None:
    client = start(root_path="/classifier")
    client.post("/predict", files=form(cat))
    client.get("/model")
    assert set(read_metric(client, "thirtytwo_requests_total")) == {("/predict", "200"), ("/model", "200")}


def test_every_class_has_a_count_from_the_start(start: Start) -> None:
    client = start()
    nothing = {(label,): 0.0 for label in CLASSES}
    assert read_metric(client, "thirtytwo_predictions_total") == nothing
    assert read_metric(client, "thirtytwo_confidence_sum_total") == nothing


def test_pictures_and_their_confidence_are_counted_by_predicted_class(start: Start) -> None:
    client = start(max_batch=4)
    predictions = client.post("/predict", files=form(*PICTURES)).json()["predictions"]
    counts, confidences = (
        read_metric(client, "thirtytwo_predictions_total"),
        read_metric(client, "thirtytwo_confidence_sum_total"),
    )
    for label in CLASSES:
        of_it = [prediction["confidence"] for prediction in predictions if prediction["label"] == label]
        assert counts[(label,)] == len(of_it)
        assert confidences[(label,)] == pytest.approx(sum(of_it), abs=1e-3)
    client.post("/v2/models/tiny_image/infer", content=PICTURES[0], headers=RAW)
    assert sum(read_metric(client, "thirtytwo_predictions_total").values()) == len(PICTURES) + 1


def test_each_step_of_a_request_is_timed(start: Start, cat: bytes) -> None:
    client = start()
    for _ in range(5):
        timing = client.post("/predict", files=form(cat, cat, cat)).headers["server-timing"]
        steps = re.fullmatch(r"decode;dur=([\d.]+), queue;dur=([\d.]+), model;dur=([\d.]+)", timing)
        assert all(float(ms) > 0 for ms in steps.groups())
    client.post("/v2/models/tiny_image/infer", content=cat, headers=RAW)
    for name in ("decode_seconds", "queue_seconds", "inference_seconds", "batch_size"):
        assert read_metric(client, f"thirtytwo_{name}_count") == {(): 6}
    assert read_metric(client, "thirtytwo_batch_size_sum") == {(): 16}
    assert read_metric(client, "thirtytwo_queue_size") == {(): 0}


def test_refusals_are_counted_by_reason(start: Start, cat: bytes) -> None:
    client = start(max_files=2)
    client.post("/predict", files=form(b"x"))
    client.post("/predict", files=form(b"x", cat))
    client.post("/predict?top_k=0", files=form(cat))
    client.post("/predict", files=form(cat, cat, cat))
    client.post("/v2/models/tiny_image/infer", content=b"x", headers=RAW)
    client.post("/v2/models/tiny/infer", content=b"{}")
    assert read_metric(client, "thirtytwo_rejections_total") == {
        ("unsupported-image",): 2,
        ("invalid-parameter",): 1,
        ("too-large",): 1,
        ("malformed-upload",): 2,
    }


def test_the_model_and_the_engine_are_named(client: httpx.Client) -> None:
    card = client.get("/model").json()
    names = ("device", "engine", "name", "precision", "version")
    assert read_metric(client, "thirtytwo_model_info") == {tuple(card[name] for name in names): 1}


class EngineWithMemory:
    """Says that it runs on a GPU."""

    def __init__(self, real: Engine) -> None:
        self.name, self.device, self.precision, self.streams = real.name, "cuda:0", real.precision, real.streams
        self._real = real

    def __call__(self, images: NDArray[np.uint8], exclusive: bool = True) -> Output:
        return self._real(images, exclusive)

    def prepare(self, sizes: Sequence[int], image: NDArray[np.uint8]) -> None:
        self._real.prepare(sizes, image)

    def memory(self) -> tuple[int, int]:
        return 3_000_000_000, 24_000_000_000


def load_with_memory(weights: Weights, settings: Settings) -> Engine:
    return EngineWithMemory(load_engine(weights, settings))


def test_memory_is_that_of_the_device_and_of_the_process(client: httpx.Client, tiny_weights: Path) -> None:
    assert read_metric(client, "thirtytwo_device_memory_bytes") == {}
    (resident,) = read_metric(client, "process_resident_memory_bytes").values()
    assert resident > 50e6
    with serving(Settings(weights=tiny_weights, max_batch=16), load_with_memory) as on_gpu:
        assert read_metric(on_gpu, "thirtytwo_device_memory_bytes") == {
            ("cuda:0", "used"): 3e9,
            ("cuda:0", "total"): 24e9,
        }


@pytest.mark.parametrize("limit", [256, 4096])
def test_queue_limit_is_exported(start: Start, limit: int) -> None:
    assert read_metric(start(max_queue=limit), "thirtytwo_queue_limit") == {(): limit}


def test_capacity_is_exported_before_the_first_image(client: httpx.Client) -> None:
    (capacity,) = read_metric(client, "thirtytwo_capacity_images_per_second").values()
    assert capacity > 0
    assert set(read_metric(client, "thirtytwo_utilization_ratio")) == {("engine",), ("event_loop",), ("decoder",)}


@pytest.mark.slow  # waits for a sample
def test_utilization_follows_requests(start: Start, cat: bytes) -> None:
    client, large = start(), png(2000, 2000)
    deadline = time.monotonic() + 60
    while not all(read_metric(client, "thirtytwo_utilization_ratio").values()):
        assert time.monotonic() < deadline
        client.post("/predict", files=form(cat, large))
    assert all(0 < ratio <= 1 for ratio in read_metric(client, "thirtytwo_utilization_ratio").values())
