from pathlib import Path

import pytest

from app.model import weights
from benchmarks import pareto

RESULTS = {"training_s": 60, "val_accuracy": 0.9, "val_accuracy_interval": [0.88, 0.92]}
FORMER_RESULTS = {name.replace("val_", "holdout_"): value for name, value in RESULTS.items()}


def with_results(source: Path, target: Path, gflops: float, results: dict[str, object]) -> Path:
    loaded = weights.load(source)
    card = loaded.card.model_copy(update={"name": target.stem, "forward_gflops": gflops, "results": results})
    weights.save(target, card, loaded.state, loaded.reference_images, loaded.reference_probabilities)
    return target


def test_files_are_sorted_by_cost(tiny_weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [
        with_results(tiny_weights, tmp_path / "large.safetensors", 2.0, RESULTS),
        with_results(tiny_weights, tmp_path / "small.safetensors", 1.0, FORMER_RESULTS),
    ]
    pareto.main([*map(str, files), "--out", str(tmp_path / "pareto.png"), "--seconds", "0"])
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[0] for row in rows] == ["| small", "| large"]
    assert (tmp_path / "pareto.png").read_bytes().startswith(b"\x89PNG")


def test_seconds_of_a_cascade_are_those_of_its_networks(cascade_weights: Path, tmp_path: Path) -> None:
    loaded = weights.load(cascade_weights)
    results = {name: value for name, value in RESULTS.items() if name != "training_s"}
    networks = [network.model_copy(update={"results": {"training_s": 40}}) for network in loaded.card.networks]
    card = loaded.card.model_copy(update={"results": results, "networks": networks})
    file = tmp_path / "cascade.safetensors"
    weights.save(file, card, *loaded[1:4], loaded.reference_stages)
    assert pareto.measure(file, 0).training_s == 40 * len(networks)


def test_file_without_validation_accuracy_is_rejected(tiny_weights: Path) -> None:
    with pytest.raises(SystemExit, match="has no validation accuracy on its card"):
        pareto.main([str(tiny_weights)])
