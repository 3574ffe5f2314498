"""The table of utilization by load, against the service with a small network."""

from pathlib import Path

import pytest

from app.settings import Settings
from benchmarks import utilization
from tests.conftest import serving


@pytest.mark.slow
def test_steps_have_their_increases(tiny_weights: Path) -> None:
    with serving(Settings(weights=tiny_weights, max_batch=16)) as client:
        peak, steps = utilization.measure(client.base_url.port or 0, [0.2, 0.4], seconds=0.5, peak_s=0.5)
    assert peak.rate > 0
    assert [step.load for step in steps] == [0.2, 0.4]
    for step in steps:
        assert step.increases["batch_size_sum"] == len(step.result.latencies)
        assert step.metrics["capacity_images_per_second"] > 0
        assert step.row().count("|") == len(utilization.COLUMNS) + 1
