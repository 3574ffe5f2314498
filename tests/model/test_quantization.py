"""What rounding to int8 keeps."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from app.model import quantization, weights


@given(filters=arrays(np.float32, (3, 2, 2, 2), elements=st.floats(-4, 4, width=32)))
@example(filters=np.full((3, 2, 2, 2), 1e-45, np.float32))
@example(filters=np.full((3, 2, 2, 2), 2e-43, np.float32))
def test_weights_are_off_by_half_a_step_at_most(tiny_weights: Path, filters: NDArray[np.float32]) -> None:
    steps, size = quantization.quantize_weights(filters)
    loaded = weights.load(tiny_weights)
    floats = loaded._replace(state={"f": steps, "f.scale": size, "bias": np.ones(3, np.float16)}).dequantized()
    assert floats.keys() == {"f", "bias"}
    assert (np.abs(floats["f"] - filters) <= 0.5001 * size).all()
    assert (np.abs(filters).max((1, 2, 3)) <= 127.001 * size.ravel()).all()


@given(top=st.floats(1e-9, 1e6))
def test_zero_is_on_the_activation_grid(top: float) -> None:
    low, high = quantization.activation_bounds(top)
    step = (high - low) / 255
    assert high == top
    assert low / step == pytest.approx(round(low / step), abs=1e-6)


@given(top=st.floats(0.01, 1e6))
def test_gelu_minimum_is_covered_with_the_fewest_steps(top: float) -> None:
    low, high = quantization.activation_bounds(top)
    below = round(-low / (high - low) * 255)
    assert low <= -0.17
    assert -(below - 1) * top / (256 - below) > -0.17
