import pytest
import torch

from app.model.networks import ConvNet, LeNet, fold_batchnorms
from training import calibration


def test_outliers_are_clipped() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.rand(1_000_000, generator=generator)
    assert calibration.mse_clipping_range(inputs) == inputs.max()
    inputs[0] = 8.0
    assert 1 < calibration.mse_clipping_range(inputs) < 5


@pytest.mark.parametrize("value", [0.0, -0.1])
def test_inputs_that_are_never_positive_have_a_range(value: float) -> None:
    assert 0 < calibration.mse_clipping_range(torch.full((100,), value)) < 0.2


def test_each_group_convolution_has_a_range_of_its_inputs() -> None:
    torch.manual_seed(0)
    network, images = ConvNet(3, (8, 8)), torch.randint(0, 256, (70, 32, 32, 3), dtype=torch.uint8)
    network.initialize(images)
    folded = fold_batchnorms(network)
    ranges = calibration.calibrate_activation_ranges(folded, images)
    assert ranges.keys() == {f"groups.{group}.convs.{i}" for group in range(2) for i in range(2)}
    with torch.inference_mode():
        first = torch.nn.functional.gelu(folded.whiten(images.permute(0, 3, 1, 2).float())).max().item()
    assert 0.1 * first < ranges["groups.0.convs.0"] <= first
    assert calibration.calibrate_activation_ranges(LeNet(3), images) == {}


@pytest.mark.slow
@pytest.mark.parametrize(("temperature", "smoothing"), [(0.2, 0.0), (1.0, 0.05), (3.0, 0.15)])
def test_temperature_and_correction_are_recovered(temperature: float, smoothing: float) -> None:
    generator = torch.Generator().manual_seed(0)
    truth = (torch.randn(20_000, 5, generator=generator) * 4).softmax(1)
    labels = torch.multinomial(truth, 1, generator=generator).squeeze(1)
    smoothed = (1 - smoothing) * truth + smoothing / 5
    found = calibration.fit_calibration(smoothed.log() * temperature, labels)
    assert found == (pytest.approx(temperature, rel=0.05), pytest.approx(smoothing, abs=0.011))


@pytest.mark.parametrize("images", [10, 100])
def test_few_images_without_errors_do_not_reach_the_bound(images: int) -> None:
    labels = torch.arange(images) % 3
    logits = torch.nn.functional.one_hot(labels, 3) * 4.0
    temperature, correction = calibration.fit_calibration(logits, labels)
    assert 0.2 < temperature < 1
    assert correction <= 0.02


def test_temperature_at_its_bound_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    labels = torch.arange(20_000) % 2
    logits = torch.nn.functional.one_hot(labels, 2) * 1.0
    assert calibration.fit_calibration(logits, labels, [0.0])[0] == pytest.approx(0.1, rel=0.01)
    assert "is at its bound" in caplog.text
