"""Fixtures: example images, weights files of small networks, and the service on a socket."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import hypothesis
import numpy as np
import pytest
import torch
import uvicorn
from numpy.typing import NDArray
from starlette.types import ASGIApp

from app.application import create_app
from app.engines.pytorch import load_network
from app.http.http_protocol import Protocol
from app.model.baseline import Baseline, Histogram
from app.model.calibration import calibrated_softmax
from app.model.card import ModelCard, Stage
from app.model.networks import ConvNet, fold_batchnorms
from app.model.ood import MEANS, WHITENING, OodCalibration
from app.model.weights import Weights, cascade_state, save
from app.settings import Settings
from app.sources import LoadEngine, load_engine

hypothesis.settings.register_profile("patient", deadline=None)  # time is no failure on a busy machine
hypothesis.settings.register_profile("long", deadline=None, max_examples=10_000)  # of make fuzz
hypothesis.settings.load_profile("patient")

EXAMPLES = Path(__file__).parents[1] / "examples"
CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


@pytest.fixture(scope="session")
def cat() -> bytes:
    return (EXAMPLES / "cat.png").read_bytes()


@pytest.fixture(scope="session")
def tiny_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The weights file of a small untrained network with CIFAR-10's classes."""
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    write(path, untrained("tiny", 8))
    return path


@pytest.fixture(scope="session")
def ood_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same network with an out-of-distribution score, which is 1 for every image."""
    path = tmp_path_factory.mktemp("weights") / "ood.safetensors"
    tiny = untrained("tiny", 8)
    calibration = OodCalibration(confidence_weight=0, distance_weight=1, quantiles=[0.0, 1e-6])
    tensors = {WHITENING: np.eye(16, dtype=np.float16), MEANS: np.zeros((10, 16), np.float16)}
    card = tiny.card.model_copy(update={"ood": calibration})
    save(path, card, tiny.state | tensors, tiny.reference_images, tiny.reference_probabilities)
    return path


@pytest.fixture(scope="session")
def baseline_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same network with the histograms of held-out images that are all bright and of two classes."""
    path = tmp_path_factory.mktemp("weights") / "baseline.safetensors"
    tiny, halves = untrained("tiny", 8), [0.5, 0.5]
    baseline = Baseline(
        images=1000,
        confidence=Histogram(edges=[0.5], shares=halves),
        brightness=Histogram(edges=[250], shares=[0, 1]),
        classes=halves + [0] * 8,
    )
    card = tiny.card.model_copy(update={"baseline": baseline})
    save(path, card, tiny.state, tiny.reference_images, tiny.reference_probabilities)
    return path


@pytest.fixture(scope="session")
def cascade_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The weights file of a cascade: a small network, a larger one, and the larger one on the flipped image."""
    path = tmp_path_factory.mktemp("weights") / "cascade.safetensors"
    networks = [untrained("small", 8), untrained("large", 16)]
    stages = [
        Stage(network=0, threshold=0.15),
        Stage(network=1, threshold=0.2),
        Stage(network=1, hflip=True, average_last=2),
    ]
    card = networks[0].card.model_copy(
        update={
            "name": "cascade",
            "architecture": "cascade",
            "arguments": {},
            "activation_ranges": {},
            "networks": [each.card for each in networks],
            "stages": stages,
        }
    )
    images = networks[0].reference_images
    small, large, flipped = (
        probabilities(networks[stage.network], images[:, :, ::-1] if stage.hflip else images) for stage in stages
    )
    mean = calibrated_softmax((np.log(large) + np.log(flipped)) / 2, 1.0, 0.0)
    save(path, card, cascade_state(networks), images, mean, np.stack([small, large, mean]))
    return path


def untrained(name: str, width: int, classes: list[str] = CLASSES, input_size: int = 32, seed: int = 0) -> Weights:
    """A network with random weights in half precision, and its reference outputs."""
    arguments = {"classes": len(classes), "widths": [width] * 3, "depth": 2}
    torch.manual_seed(seed)
    network = ConvNet(**arguments)
    images = torch.randint(0, 256, (4, input_size, input_size, 3), dtype=torch.uint8)
    network.initialize(images)
    state = {name: value.half().numpy() for name, value in fold_batchnorms(network).state_dict().items()}
    card = ModelCard(
        name=name,
        classes=classes,
        input_size=input_size,
        architecture="convnet",
        arguments=arguments,
        parameters=sum(p.numel() for p in network.parameters()),
        temperature=1.0,
        activation_ranges={f"groups.{group}.convs.{i}": 8.0 for group in range(3) for i in range(2)},
        test_accuracy=0.1,
        dataset="noise",
        recipe={},
    )
    weights = Weights(card, state, images.numpy(), np.empty(0, np.float32), "")
    return weights._replace(reference_probabilities=probabilities(weights, images.numpy()))


def write(path: Path, weights: Weights) -> None:
    """Renames the weights file into place."""
    save(path, weights.card, weights.state, weights.reference_images, weights.reference_probabilities)


@torch.inference_mode()
def probabilities(weights: Weights, images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """The stored network's softmax, in float32."""
    batch = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2)
    softmax: NDArray[np.float32] = load_network(weights)(batch).softmax(1).numpy()
    return softmax


@contextmanager
def serving(
    settings: Settings,
    load_engine: LoadEngine = load_engine,
    protocol: type[Protocol] = Protocol,
    around: Callable[[ASGIApp], ASGIApp] = lambda app: app,
    loop: str = "auto",
) -> Iterator[httpx.Client]:
    """A client of the application, which runs in a thread on a free port of loopback."""
    app = around(create_app(settings, load_engine))
    options = {"log_config": None, "lifespan": "on", "http": protocol, "loop": loop}
    server = uvicorn.Server(uvicorn.Config(app, port=0, **options))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 60
    while not server.started:
        assert thread.is_alive(), "the service did not start"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as client:
            yield client
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive(), "the service did not stop"


@pytest.fixture(scope="module")
def start(tiny_weights: Path) -> Iterator[Callable[..., httpx.Client]]:
    """Starts the service with settings and the tiny weights by default; stops it after the module."""
    with ExitStack() as stack:

        def start_with(**values: object) -> httpx.Client:
            settings = Settings(**{"weights": tiny_weights, "max_batch": 16, **values})
            return stack.enter_context(serving(settings))

        yield start_with


@pytest.fixture(scope="module")
def client(start: Callable[..., httpx.Client]) -> httpx.Client:
    return start()


@pytest.fixture(scope="session")
def bundled() -> Iterator[httpx.Client]:
    """The service with the bundled weights and default settings."""
    with serving(Settings()) as client:
        yield client
