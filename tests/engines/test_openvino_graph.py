"""The OpenVINO graph is a twin of ConvNet: both give the same probabilities, whatever the shape."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from app.engines.openvino import OpenVINOEngine
from app.engines.pytorch import calibrated_softmax
from app.model import calibration
from app.model.card import ModelCard
from app.model.networks import BatchNorm, ConvNet, fold_batchnorms
from app.model.weights import Weights


def random_network(widths: list[int], depth: int, seed: int) -> ConvNet:
    """Every parameter and statistic random, so that no part can be left out unnoticed."""
    torch.manual_seed(seed)
    network = ConvNet(5, widths, depth)
    network.initialize(torch.randint(0, 256, (20, 16, 16, 3), dtype=torch.uint8))
    for module in network.modules():
        if isinstance(module, BatchNorm):
            nn.init.normal_(module.bias)
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 1, 20)
    nn.init.normal_(network.head.weight, std=8)
    return network


def card(widths: list[int], depth: int, size: int, temperature: float, correction: float) -> ModelCard:
    return ModelCard(
        name="twin",
        classes=list("abcde"),
        input_size=size,
        architecture="convnet",
        arguments={"classes": 5, "widths": widths, "depth": depth},
        parameters=1,
        temperature=temperature,
        label_smoothing_correction=correction,
        test_accuracy=None,
        dataset="noise",
        recipe={},
    )


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Small tensors gain nothing from a second thread, and wait for it on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.slow
@settings(max_examples=25)
@given(
    # OpenVINO 2026.4.1 computes a residual around convolutions of a single channel wrongly; the reference check of a
    # weights file finds that.
    widths=st.lists(st.integers(2, 24), min_size=1, max_size=3),
    depth=st.integers(1, 4),
    size=st.integers(12, 48),
    temperature=st.floats(0.5, 3),
    correction=st.floats(0, 0.2),
    seed=st.integers(0, 1000),
)
def test_graph_equals_the_network(
    widths: list[int], depth: int, size: int, temperature: float, correction: float, seed: int
) -> None:
    folded = fold_batchnorms(random_network(widths, depth, seed))
    images = np.random.default_rng(seed).integers(0, 256, (3, size, size, 3), np.uint8)
    with torch.inference_mode():
        logits = folded(torch.from_numpy(images).permute(0, 3, 1, 2)).numpy()
    expected = calibration.calibrated_softmax(logits, temperature, correction)
    state = {name: value.numpy() for name, value in folded.state_dict().items()}
    weights = Weights(card(widths, depth, size, temperature, correction), state, images, expected, "")
    probabilities = OpenVINOEngine(weights, "cpu", 1, "float32")(images).probabilities
    np.testing.assert_allclose(probabilities, expected, atol=1e-4)


@given(
    seed=st.integers(0, 1000),
    temperature=st.floats(0.1, 10),
    correction=st.floats(0, 0.9),
    scale=st.floats(0, 50),
)
def test_torch_calibration_equals_the_reference(seed: int, temperature: float, correction: float, scale: float) -> None:
    logits = (np.random.default_rng(seed).normal(0, 1, (20, 7)) * scale).astype(np.float32)
    expected = calibration.calibrated_softmax(logits, temperature, correction)
    found = calibrated_softmax(torch.from_numpy(logits), temperature, correction).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-5)
    np.testing.assert_allclose(expected.sum(1), 1, atol=1e-5)
    top = logits.argmax(1)[:, None]
    assert (np.take_along_axis(expected, top, 1) >= expected.max(1, keepdims=True) - 1e-6).all()
