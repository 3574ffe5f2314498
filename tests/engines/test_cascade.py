"""The cascade: exits, averages, padding, and independence of the other images in a batch."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from app import engines
from app.engines import CascadeEngine, Output, verify_references
from app.engines.cascade import plan_passes
from app.errors import WeightsError
from app.model import weights
from app.model.calibration import calibrated_softmax
from app.model.card import Stage
from app.model.weights import Weights


class PixelEngine:
    """Two classes; the logit of class 1 is the first pixel's value times `scale`. Records its batch sizes."""

    name, device, precision, streams = "pixel", "cpu", "float32", 1

    def __init__(self, scale: float) -> None:
        self.scale = np.float32(scale)
        self.batches: list[int] = []

    def __call__(self, images: NDArray[np.uint8], exclusive: bool = True) -> Output:
        self.batches.append(len(images))
        logits = np.stack([np.zeros(len(images)), images[:, 0, 0, 0] * self.scale], 1).astype(np.float32)
        return Output(calibrated_softmax(logits, 1.0, 0.0), np.zeros(len(images), np.uint8))

    def prepare(self, sizes: Sequence[int], image: NDArray[np.uint8]) -> None:
        self.batches += sizes

    def memory(self) -> None:
        return None


def pixels(*values: int) -> NDArray[np.uint8]:
    images = np.zeros((len(values), 4, 4, 3), np.uint8)
    images[:, 0, 0, 0] = values
    return images


def cascade(*stages: Stage, sizes: Sequence[int] = (), early_exit: bool = True) -> CascadeEngine:
    networks = [PixelEngine(0.01), PixelEngine(0.1)]
    engine = CascadeEngine(networks, stages, early_exit)
    engine.prepare(sizes, pixels(0)[0])
    for network in networks:
        network.batches.clear()
    return engine


def batches(engine: CascadeEngine) -> list[list[int]]:
    return [network.batches for network in engine._networks if isinstance(network, PixelEngine)]


TWO = (Stage(network=0, threshold=0.7), Stage(network=1))


def test_confident_images_leave_after_the_first_stage() -> None:
    engine = cascade(*TWO)
    probabilities, stages, _ = engine(pixels(0, 200, 50))
    assert stages.tolist() == [1, 0, 1]
    assert batches(engine) == [[3], [2]]
    assert probabilities[1, 1] == pytest.approx(1 / (1 + np.exp(-2)), abs=1e-6)
    assert probabilities[2, 1] == pytest.approx(1 / (1 + np.exp(-5)), abs=1e-6)


def test_without_early_exit_all_images_pass_all_stages() -> None:
    engine = cascade(*TWO, early_exit=False)
    _, stages, _ = engine(pixels(0, 200, 50))
    assert stages.tolist() == [1, 1, 1]
    assert batches(engine) == [[3], [3]]


def test_later_stages_run_at_prepared_sizes() -> None:
    engine = cascade(*TWO, sizes=[1, 4])
    engine(pixels(0, 0, 0))
    engine(pixels(0, 0, 0, 0, 0))
    assert batches(engine) == [[4, 5], [4, 5]]  # beyond the largest prepared size in one pass


@pytest.mark.parametrize(
    ("sizes", "overhead", "count", "passes"),
    [
        ([1, 2, 4, 8], 0.75, 3, [2, 1]),
        ([1, 2, 4, 8], 0.75, 5, [4, 1]),
        ([1, 2, 4, 8], 0.75, 7, [8]),
        ([1, 2, 4, 8], 8, 5, [8]),
        ([1, 2, 4, 8], 0.75, 0, []),
    ],
)
def test_passes_are_split_or_padded(sizes: list[int], overhead: float, count: int, passes: list[int]) -> None:
    assert plan_passes(sizes, overhead)[count] == passes


@given(sizes=st.sets(st.integers(1, 40), min_size=1, max_size=6), overhead=st.floats(0, 50))
def test_passes_hold_all_images(sizes: set[int], overhead: float) -> None:
    plans = plan_passes(sorted(sizes), overhead)
    assert len(plans) == max(sizes) + 1
    assert plans[0] == []
    for count, passes in enumerate(plans[1:], start=1):
        assert set(passes) <= sizes
        assert count <= sum(passes) < count + min(passes)


def test_flip_and_average_are_applied() -> None:
    image = pixels(0)
    image[0, 0, 3, 0] = 100  # the first pixel of the flip
    stages = (Stage(network=0, threshold=1.0), Stage(network=1, hflip=True, average_last=2, temperature=2.0))
    probabilities, _, _ = cascade(*stages)(image)
    mean = (np.log([0.5, 0.5]) + np.log(1 / (1 + np.exp([10.0, -10.0])))) / 2
    expected = np.exp(mean / 2) / np.exp(mean / 2).sum()
    assert probabilities[0] == pytest.approx(expected, abs=1e-5)


stage_lists = st.lists(
    st.builds(
        Stage,
        network=st.integers(0, 1),
        hflip=st.booleans(),
        average_last=st.just(1),
        temperature=st.floats(0.3, 3),
        label_smoothing_correction=st.sampled_from([0.0, 0.1]),
        threshold=st.floats(0.5, 1),
    ),
    min_size=1,
    max_size=4,
)


@given(stages=stage_lists, values=st.lists(st.integers(0, 255), min_size=1, max_size=20), data=st.data())
def test_result_is_independent_of_the_batch(stages: list[Stage], values: list[int], data: st.DataObject) -> None:
    """Bit for bit, for averages over any number of stages."""
    stages = [
        stage.model_copy(
            update={
                "average_last": data.draw(st.integers(1, i + 1)),
                "threshold": None if i == len(stages) - 1 else stage.threshold,
            }
        )
        for i, stage in enumerate(stages)
    ]
    engine = cascade(*stages, sizes=[1, 2, 4, 8])
    together = engine(pixels(*values))
    order = data.draw(st.permutations(range(len(values))))
    cut = data.draw(st.integers(0, len(values)))
    for part in (order[:cut], order[cut:]):
        if part:
            output = engine(pixels(*(values[i] for i in part)))
            assert np.array_equal(output.probabilities, together.probabilities[part])
            assert np.array_equal(output.stages, together.stages[part])
    assert together.probabilities.sum(1) == pytest.approx(1, abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["openvino", "torch"])
def test_cascade_file_is_served(cascade_weights: Path, name: str) -> None:
    loaded = weights.load(cascade_weights)
    engine = engines.load(loaded, "cpu", name=name)
    engine.prepare([1, 2, 4], loaded.reference_images[0])
    probabilities, stages, _ = engine(loaded.reference_images)
    assert probabilities.shape == (4, 10)
    assert set(stages.tolist()) <= {0, 1, 2}
    everything = engines.load(loaded, "cpu", name=name, early_exit=False)
    assert everything(loaded.reference_images).stages.tolist() == [2] * 4


@pytest.mark.slow
@settings(max_examples=20)
@given(order=st.permutations(range(16)), cut=st.integers(1, 15))
def test_openvino_cascade_is_independent_of_the_batch(
    openvino_cascade: CascadeEngine, noise: NDArray[np.uint8], order: list[int], cut: int
) -> None:
    together = openvino_cascade(noise)
    assert len(set(together.stages.tolist())) > 1
    for part in (order[:cut], order[cut:]):
        output = openvino_cascade(noise[part])
        assert np.array_equal(output.probabilities, together.probabilities[part])


@pytest.fixture(scope="module")
def noise() -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (16, 32, 32, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def openvino_cascade(cascade_weights: Path, noise: NDArray[np.uint8]) -> CascadeEngine:
    loaded = weights.load(cascade_weights)
    engine = engines.load(loaded, "cpu", name="openvino")
    assert isinstance(engine, CascadeEngine)
    first = engine.run_stages(noise, early_exit=False)[0].probabilities.max(1)
    stages = [engine._stages[0].model_copy(update={"threshold": float(np.median(first))}), *engine._stages[1:]]
    engine = CascadeEngine(engine._networks, stages)
    engine.prepare([1, 2, 3, 4, 6, 8, 12, 16], noise[0])
    return engine


def test_reference_of_every_stage_is_verified(cascade_weights: Path) -> None:
    loaded = weights.load(cascade_weights)
    assert loaded.reference_stages is not None
    engine = engines.load(loaded, "cpu", name="openvino")
    for stage in range(3):
        wrong = loaded.reference_stages.copy()
        wrong[stage] = np.roll(wrong[stage], 1, axis=1) + 0.2
        with pytest.raises(WeightsError, match="differs from the file's reference"):
            verify_references(engine, loaded._replace(reference_stages=wrong))


def test_networks_of_a_cascade_have_their_own_cards(cascade_weights: Path) -> None:
    loaded: Weights = weights.load(cascade_weights)
    small, large = loaded.networks
    assert small.card.arguments["widths"] == [8, 8, 8]
    assert large.card.arguments["widths"] == [16, 16, 16]
    assert set(small.state) == set(large.state)
