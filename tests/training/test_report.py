from pathlib import Path

import pytest
import torch

from training import metrics, report


@pytest.mark.parametrize("classes", [2, 10, 200])
def test_report_of_any_number_of_classes(tmp_path: Path, classes: int) -> None:
    names = [f"$class {i}$ é" if i else "a" * 200 for i in range(classes)]
    generator = torch.Generator().manual_seed(0)
    probabilities = torch.randn(400, classes, generator=generator).softmax(1)
    labels = torch.randint(classes, (400,), generator=generator)
    images = torch.zeros(400, 8, 8, 3, dtype=torch.uint8)
    results = metrics.classification_metrics(probabilities, labels, names)
    mistakes = report.top_losses(images, probabilities, labels, names)
    assert [mistake.confidence for mistake in mistakes] == sorted((m.confidence for m in mistakes), reverse=True)
    history = [{"epoch": 1, "loss": 1.0, "train_accuracy": 0.5, "val_accuracy": 0.5}]
    report.write_run(tmp_path, "title", history, results, mistakes)
    plots = {"confusion.png", "learning.png", "mistakes.png", "reliability.png"}
    texts = {"evaluation.json", "evaluation.txt", "report.md"}
    assert {path.name for path in tmp_path.iterdir()} == plots | texts
    text = report.text(results)
    assert "macro average" in text
    assert f"{results['accuracy']:.2%}" in text


def test_perfect_predictions_have_no_mistakes(tmp_path: Path) -> None:
    labels = torch.tensor([0, 1, 1])
    probabilities = torch.nn.functional.one_hot(labels).float()
    results = metrics.classification_metrics(probabilities, labels, ["a", "b"])
    assert (results["accuracy"], results["calibration_error"]) == (1, 0)
    report.write_run(tmp_path, "title", [], results, report.top_losses(labels, probabilities, labels, ["a", "b"]))
    assert "Learning" not in (tmp_path / "report.md").read_text()
