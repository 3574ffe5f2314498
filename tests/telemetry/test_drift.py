"""The population stability index of served images against the held-out images of the weights file."""

from collections.abc import Callable, Sequence
from pathlib import Path

import httpx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.inference.pipeline import Prediction
from app.model.baseline import Baseline, Histogram
from app.model.card import ModelCard, Stage
from app.telemetry.drift import CHUNK, DriftMonitor, critical_value, population_stability_index
from app.telemetry.metrics import Metrics
from tests.conftest import untrained
from tests.support.monitoring import read_metric

HALVES = Histogram(edges=[0.5], shares=[0.5, 0.5])
BASELINE = Baseline(
    images=1000,
    confidence=HALVES,
    brightness=Histogram(edges=[128.0], shares=[0.5, 0.5]),
    ood_score=HALVES,
    classes=[0.5, 0.5] + [0.0] * 8,
)
FEATURES = {"confidence", "brightness", "ood_score", "class"}
WINDOW = 1000


@pytest.fixture
def card() -> ModelCard:
    return untrained("tiny", 8).card.model_copy(update={"baseline": BASELINE})


def image(label: int, confidence: float, brightness: float, ood: float = 0.2) -> Prediction:
    probabilities = np.zeros(10, np.float32)
    probabilities[label] = confidence
    return Prediction(probabilities, 0, ood, brightness, None)


USUAL = [image(0, 0.4, 100, 0.2), image(1, 0.9, 200, 0.8)] * (CHUNK // 2)


def value(metrics: Metrics, name: str, feature: str) -> float | None:
    return metrics.registry.get_sample_value(f"thirtytwo_drift_{name}", {"feature": feature})


def indices(metrics: Metrics) -> dict[str, float | None]:
    return {feature: value(metrics, "psi", feature) for feature in sorted(FEATURES)}


def started(card: ModelCard) -> tuple[Metrics, DriftMonitor]:
    metrics = Metrics()
    monitor = DriftMonitor(metrics, WINDOW)
    monitor.start("a", card)
    return metrics, monitor


def test_the_index_is_the_published_sum() -> None:
    index = population_stability_index(np.array([0.25, 0.75]), 10**9, np.array([500_000, 500_000]))
    assert index == pytest.approx(0.25 * np.log(2) - 0.25 * np.log(0.5 / 0.75), abs=1e-4)


@given(st.lists(st.integers(1, 10**6), min_size=2, max_size=50))
def test_equal_shares_have_the_index_zero(counts: list[int]) -> None:
    shares = np.array(counts) / sum(counts)
    assert population_stability_index(shares, sum(counts), np.array(counts)) == pytest.approx(0, abs=1e-9)


@given(st.lists(st.tuples(st.integers(0, 1000), st.integers(0, 1000)), min_size=2, max_size=20))
def test_the_index_is_finite_and_not_negative(bins: list[tuple[int, int]]) -> None:
    held_out, counts = np.array(bins).T
    images = int(held_out.sum())
    assert 0 <= population_stability_index(held_out / max(1, images), images, counts) < np.inf


@pytest.mark.parametrize(("bins", "held_out", "served"), [(10, 1500, 1000), (10, 1500, 10_000), (3, 200, 1000)])
def test_chance_exceeds_the_critical_value_once_in_1000(bins: int, held_out: int, served: int) -> None:
    random, shares = np.random.default_rng(0), np.full(bins, 1 / bins)
    limit = critical_value(bins, held_out, served)
    exceeded = [
        population_stability_index(
            random.multinomial(held_out, shares) / held_out, held_out, random.multinomial(served, shares)
        )
        > limit
        for _ in range(10_000)
    ]
    assert 1 <= sum(exceeded) <= 25


def test_usual_images_have_no_drift(card: ModelCard) -> None:
    metrics, monitor = started(card)
    monitor.observe("a", USUAL)
    assert indices(metrics) == {feature: pytest.approx(0, abs=1e-3) for feature in FEATURES}


@pytest.mark.parametrize(
    ("changed", "drifted"),
    [
        ([image(0, 0.4, 250, 0.2), image(1, 0.9, 200, 0.8)], "brightness"),
        ([image(0, 0.8, 100, 0.2), image(1, 0.9, 200, 0.8)], "confidence"),
        ([image(0, 0.4, 100, 0.2), image(0, 0.9, 200, 0.8)], "class"),
        ([image(7, 0.4, 100, 0.2), image(1, 0.9, 200, 0.8)], "class"),
        ([image(0, 0.4, 100, 0.9), image(1, 0.9, 200, 0.8)], "ood_score"),
    ],
)
def test_one_changed_feature_drifts_alone(card: ModelCard, changed: list[Prediction], drifted: str) -> None:
    metrics, monitor = started(card)
    monitor.observe("a", changed * CHUNK)
    found = {feature for feature in FEATURES if (value(metrics, "psi", feature) or 0) > 0.2}
    assert found == {drifted}
    assert (value(metrics, "psi", drifted) or 0) > (value(metrics, "psi_critical", drifted) or 0) > 0


def test_nothing_is_exported_before_a_tenth_of_the_window(card: ModelCard) -> None:
    metrics, monitor = started(card)
    monitor.observe("a", USUAL[: CHUNK - 1])
    assert set(indices(metrics).values()) == {None}


def test_old_images_leave_the_window(card: ModelCard) -> None:
    metrics, monitor = started(card)
    for _ in range(10):
        monitor.observe("a", [image(0, 0.9, 250)] * CHUNK)
    assert (value(metrics, "psi", "brightness") or 0) > 1
    for _ in range(9):
        monitor.observe("a", USUAL)
    assert (value(metrics, "psi", "brightness") or 0) > 0.001
    monitor.observe("a", USUAL)
    assert value(metrics, "psi", "brightness") == pytest.approx(0, abs=1e-3)


def test_another_model_starts_an_empty_window(card: ModelCard) -> None:
    metrics, monitor = started(card)
    monitor.observe("a", [image(0, 0.9, 250)] * CHUNK)
    monitor.start("b", card)
    assert set(indices(metrics).values()) == {0}
    monitor.observe("a", [image(0, 0.9, 250)] * CHUNK)  # a request that started before
    assert set(indices(metrics).values()) == {0}
    monitor.observe("b", USUAL)
    assert value(metrics, "psi", "brightness") == pytest.approx(0, abs=1e-3)


def test_a_cascade_of_one_stage_has_no_drift_of_stages(card: ModelCard) -> None:
    single = card.model_copy(update={"stages": [Stage(network=0, share=1.0)]})
    metrics, monitor = started(single)
    monitor.observe("a", USUAL * (WINDOW // CHUNK))
    assert value(metrics, "psi", "exit_stage") is None
    assert value(metrics, "psi", "class") is not None


def test_a_file_without_baseline_exports_no_index(card: ModelCard) -> None:
    metrics, monitor = started(card.model_copy(update={"baseline": None}))
    monitor.observe("a", USUAL)
    assert set(indices(metrics).values()) == {None}


def test_metrics_show_the_drift_of_uploads(
    start: Callable[..., httpx.Client], baseline_weights: Path, cat: bytes
) -> None:
    client = start(weights=baseline_weights)
    assert client.get("/model").json()["baseline"]["images"] == 1000
    for _ in range(4):
        assert client.post("/predict", files=[("file", ("x.png", cat))] * 250).status_code == 200
    found = read_metric(client, "thirtytwo_drift_psi")
    assert found.keys() == {("confidence",), ("brightness",), ("class",)}
    assert found["brightness",] > 0.2


def test_a_histogram_has_one_share_more_than_edges() -> None:
    with pytest.raises(ValueError, match="one share more"):
        Histogram(edges=[0.5], shares=[1.0, 0.0, 0.0])
    with pytest.raises(ValueError, match="must increase"):
        Histogram(edges=[0.5, 0.5], shares=[0.5, 0.5, 0.0])


def test_a_baseline_of_other_classes_is_refused(card: ModelCard) -> None:
    other: Sequence[float] = [0.5, 0.5]
    with pytest.raises(ValueError, match="the baseline has 2 classes, the card has 10"):
        ModelCard.model_validate(card.model_dump() | {"baseline": BASELINE.model_dump() | {"classes": other}})


def test_without_early_exit_a_cascade_has_no_drift_of_stages_and_confidences(card: ModelCard) -> None:
    stages = [Stage(network=0, share=1.0, threshold=0.9), Stage(network=0, share=0.25)]
    two, metrics = card.model_copy(update={"stages": stages}), Metrics()
    monitor = DriftMonitor(metrics, WINDOW)
    monitor.start("a", two, early_exit=False)
    monitor.observe("a", [each._replace(stage=1) for each in USUAL] * (WINDOW // CHUNK))
    found = {name for name in (*FEATURES, "exit_stage") if value(metrics, "psi", name) is not None}
    assert found == {*FEATURES} - {"confidence", "exit_stage"}
