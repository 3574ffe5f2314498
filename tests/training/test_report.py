from pathlib import Path

import pytest
import torch

from training import metrics, report


@pytest.mark.slow
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
    history = [{"epoch": 1, "loss": 1.0, "train_accuracy": 0.5, "val_accuracy": 0.5, "val_loss": 1.2}]
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


def test_rare_class_that_is_never_predicted_is_named() -> None:
    labels = torch.tensor([0] * 9 + [1])
    probabilities = torch.tensor([[0.9, 0.1]]).repeat(10, 1)
    results = metrics.classification_metrics(probabilities, labels, ["cat", "dog"])
    assert (results["balanced_accuracy"], results["majority_baseline"]) == (0.5, 0.9)
    assert results["macro_f1"] == pytest.approx(0.474, abs=0.001)
    assert report.warnings(results) == ["warning: never predicted: dog (1 of 2 classes)"]
    assert report.warnings(results)[0] in report.text(results)


def test_means_leave_out_classes_without_images() -> None:
    labels = torch.tensor([0, 0, 1, 1])
    probabilities = torch.nn.functional.one_hot(labels, 3).float()
    results = metrics.classification_metrics(probabilities, labels, ["cat", "dog", "zebra"])
    assert (results["balanced_accuracy"], results["macro_f1"]) == (1, 1)
    assert results["macro_average"] == {"precision": 1, "recall": 1, "f1-score": 1, "support": 4}
    assert results["per_class"]["zebra"]["support"] == 0


def test_most_confused_pairs_replace_a_large_matrix() -> None:
    names = [f"class {i}" for i in range(200)]
    labels = torch.arange(200).repeat(3)
    predicted = torch.where(labels == 7, 9, labels)
    results = metrics.classification_metrics(torch.nn.functional.one_hot(predicted, 200).float(), labels, names)
    assert report.confused_pairs(results) == [(3, "class 7", "class 9")]
    assert "    3  class 7        class 9" in report.text(results)


def test_columns_of_wide_characters_are_aligned() -> None:
    lines = report.class_counts(["猫", "犬の写真", "a" * 200], torch.tensor([0, 1, 1, 2])).splitlines()
    assert lines[0].startswith("犬の写真" + " " * 52)
    assert [line[-15:] for line in lines] == ["     2   50.0 %", "     1   25.0 %", "     1   25.0 %"]


@pytest.mark.slow
def test_names_without_glyphs_are_plotted(tmp_path: Path) -> None:
    labels = torch.tensor([0, 1])
    results = metrics.classification_metrics(torch.tensor([[0.1, 0.9], [0.2, 0.8]]), labels, ["猫", "$x^2$"])
    mistakes = report.top_losses(torch.zeros(2, 8, 8, 3, dtype=torch.uint8), torch.eye(2), 1 - labels, ["猫", "$x^2$"])
    report.write_run(tmp_path, "猫", [], results, mistakes, {"Recipe": "--epochs 3: why"})
    assert "## Recipe\n\n```\n--epochs 3: why\n```" in (tmp_path / "report.md").read_text()
