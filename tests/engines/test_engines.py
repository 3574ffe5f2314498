import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from app import engines
from app.engines import hardware
from app.engines.pytorch import TorchEngine
from app.errors import DeviceError, WeightsError
from app.model import weights
from app.model.weights import Weights
from tests.conftest import EXAMPLES, untrained


@pytest.fixture(scope="module")
def tiny(tiny_weights: Path) -> Weights:
    return weights.load(tiny_weights)


@pytest.mark.parametrize(
    ("name", "precision", "tolerance"),
    [
        ("torch", "float32", 1e-5),
        ("torch", "bfloat16", 0.02),
        ("openvino", "float32", 1e-5),
        ("openvino", "bfloat16", 0.02),
        ("openvino", "int8", 0.03),
    ],
)
def test_engines_reproduce_the_reference_probabilities(
    tiny: Weights, name: str, precision: str, tolerance: float
) -> None:
    engine = engines.load(tiny, name=name, precision=precision)
    assert (engine.name, engine.device, engine.precision) == (name, "cpu", precision)
    found = engine(tiny.reference_images).probabilities
    assert found.shape == (4, 10)
    assert found.dtype == np.float32
    assert np.allclose(found.sum(1), 1, atol=1e-3)
    assert np.abs(found - tiny.reference_probabilities).max() < tolerance


@pytest.mark.parametrize("name", ["torch", "openvino"])
def test_smoothing_correction_keeps_the_order(tiny: Weights, name: str) -> None:
    plain = tiny.reference_probabilities
    smoothing = 10 * float(np.sort(plain, 1)[0, -3])  # all but two of the first image's classes are below it
    less = np.maximum(plain - smoothing / 10, plain / 100)
    expected = less / less.sum(1, keepdims=True)
    card = tiny.card.model_copy(update={"label_smoothing_correction": smoothing})
    corrected = tiny._replace(card=card, reference_probabilities=expected)
    found = engines.load(corrected, name=name, precision="float32")(tiny.reference_images).probabilities
    assert np.abs(found - expected).max() < 1e-5
    assert np.array_equal(found.argsort(1), plain.argsort(1))
    assert found[0].max() > 2 * plain[0].max()


def test_openvino_results_are_independent_of_the_batch(tiny: Weights) -> None:
    """Results are bit-identical, exclusive or not, in a batch of any size."""
    engine = engines.load(tiny, name="openvino")
    images = np.random.default_rng(0).integers(0, 256, (24, 32, 32, 3), np.uint8)
    whole = engine(images).probabilities
    for size, exclusive in ((1, True), (3, True), (8, False), (16, False)):
        assert np.array_equal(
            np.concatenate([engine(images[i : i + size], exclusive).probabilities for i in range(0, 24, size)]), whole
        )


@pytest.mark.slow
@pytest.mark.parametrize(("threads", "streams"), [(1, 1), (2, 2), (5, 2)])
def test_openvino_streams_run_concurrently(tiny: Weights, threads: int, streams: int) -> None:
    engine = engines.load(tiny, threads=threads, name="openvino")
    assert engine.streams == streams
    images = np.random.default_rng(0).integers(0, 256, (64, 32, 32, 3), np.uint8)
    expected = engine(images).probabilities
    with ThreadPoolExecutor(streams) as pool:
        for found in pool.map(lambda i: engine(images[i:], exclusive=streams == 1).probabilities, range(60)):
            assert np.array_equal(found, expected[-len(found) :])


def test_cpu_runs_openvino_by_default(tiny: Weights) -> None:
    assert engines.load(tiny, device="cpu").name == "openvino"


def test_unsupported_architecture_falls_back_to_torch(tiny: Weights, caplog: pytest.LogCaptureFixture) -> None:
    other = tiny._replace(card=tiny.card.model_copy(update={"architecture": "lenet"}))
    with pytest.raises(WeightsError, match="Invalid arguments of lenet"):
        engines.load(other)
    assert "falling back to torch: The openvino engine does not support the architecture lenet" in caplog.text


def test_missed_references_are_rejected(tiny: Weights) -> None:
    wrong = np.roll(tiny.reference_probabilities, 1, axis=1) + 0.2
    for name in ("torch", "openvino"):
        with pytest.raises(WeightsError, match=f"The output of {name} on cpu in .* differs from the file's reference"):
            engines.load(tiny._replace(reference_probabilities=wrong), name=name)


def test_cpu_model_is_read(tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nmodel name\t: Some CPU @ 3 GHz\n")
    assert hardware.cpu_model(tmp_path / "cpuinfo") == "Some CPU @ 3 GHz"
    assert hardware.cpu_model(tmp_path / "none")


@pytest.mark.skipif("int8" not in hardware.native_precisions(hardware.cpu_flags()), reason="the CPU has no fast int8")
def test_next_precision_follows_a_missed_self_check(tiny: Weights, caplog: pytest.LogCaptureFixture) -> None:
    clipped = dict.fromkeys(tiny.card.activation_ranges, 0.01)
    sharp = tiny._replace(card=tiny.card.model_copy(update={"activation_ranges": clipped, "temperature": 0.3}))
    file = sharp._replace(reference_probabilities=TorchEngine(sharp, "cpu", 1, "float32")(tiny.reference_images)[0])
    engine = engines.load(file)
    assert (engine.name, engine.precision) == ("openvino", "bfloat16")
    assert [record.getMessage()[:40] for record in caplog.records] == ["falling back from int8 to bfloat16: The "]
    with pytest.raises(WeightsError, match="in int8 differs"):
        engines.load(file, precision="int8", name="openvino")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "torch", "precision": "int8"}, "int8 needs the openvino engine"),
        ({"name": "openvino", "precision": "float16"}, "not in float16"),
        ({"name": "openvino", "device": "mps"}, "runs on the CPU, not on mps"),
        ({"device": "cuda:5"}, "cuda:5 is not available"),
        ({"device": "tpu"}, "tpu is not a device"),
        ({"device": "mps"}, "mps is not available"),
    ],
)
def test_unavailable_device_or_precision_is_named(tiny: Weights, options: dict[str, str], message: str) -> None:
    with pytest.raises(DeviceError, match=message):
        engines.load(tiny, **options)


@pytest.mark.parametrize(
    ("flags", "precisions"),
    [
        ("avx2 avx512f avx512_vnni avx512_bf16", ["int8", "bfloat16", "float32"]),
        ("avx512f avx512_vnni", ["int8", "float32"]),
        ("avx2 avx_vnni", ["int8", "float32"]),
        ("avx512f avx512_bf16", ["bfloat16", "float32"]),
        ("avx2", ["float32"]),
        ("", ["float32"]),
    ],
)
def test_precisions_follow_the_cpu_flags(tmp_path: Path, flags: str, precisions: list[str]) -> None:
    report = tmp_path / "cpuinfo"
    report.write_text(f"processor\t: 0\nflags\t\t: fpu {flags}\n")
    assert hardware.native_precisions(hardware.cpu_flags(report)) == precisions


def test_unknown_cpu_computes_in_float32(tmp_path: Path) -> None:
    assert hardware.native_precisions(hardware.cpu_flags(tmp_path / "none")) == ["float32"]


def test_int8_without_ranges_is_refused() -> None:
    tiny = untrained("tiny", 8)
    without = tiny._replace(card=tiny.card.model_copy(update={"activation_ranges": {}}))
    with pytest.raises(DeviceError, match="no activation ranges"):
        engines.load(without, "cpu", name="openvino", precision="int8")


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "int8"])
def test_bundled_weights_run_in_every_openvino_precision(precision: str) -> None:
    assert engines.load(weights.load(weights.BUNDLED), name="openvino", precision=precision).precision == precision


@pytest.mark.slow
def test_int8_agrees_with_float32_on_trained_weights() -> None:
    from app.model.preprocessing import Limits, decode

    bundled = weights.load(weights.BUNDLED)
    pictures = np.stack(
        [decode(path.read_bytes(), Limits(32, 10**6)).pixels for path in sorted(EXAMPLES.glob("*.png"))]
    )
    exact = engines.load(bundled, name="torch", precision="float32")(pictures).probabilities
    quick = engines.load(bundled, name="openvino", precision="int8")(pictures).probabilities
    assert np.array_equal(exact.argmax(1), quick.argmax(1))
    assert np.abs(exact - quick).max() < 0.1


@pytest.mark.slow
def test_signals_are_handled_after_engines_are_released(tiny_weights: Path) -> None:
    program = (
        "import os, signal, sys; from pathlib import Path; from app import engines; from app.model import weights\n"
    )
    program += "loaded = weights.load(Path(sys.argv[1]))\n"
    program += "first, second = (engines.load(loaded, name='openvino') for _ in range(2))\n"
    program += "del first, second\n"
    program += "signal.signal(signal.SIGTERM, lambda *_: None)\n"
    program += "os.kill(os.getpid(), signal.SIGTERM)\n"
    subprocess.run([sys.executable, "-c", program, str(tiny_weights)], check=True)


@pytest.mark.slow
def test_openvino_sends_no_telemetry(tiny_weights: Path, tmp_path: Path) -> None:
    """OpenVINO's telemetry would write an identifier into the home folder."""
    program = "import sys; from pathlib import Path; from app import engines; from app.model import weights; "
    program += "engines.load(weights.load(Path(sys.argv[1])), name='openvino')"
    command = [sys.executable, "-c", program, str(tiny_weights)]
    subprocess.run(command, env={**os.environ, "HOME": str(tmp_path), "CI": ""}, check=True)
    assert list(tmp_path.iterdir()) == []
