from functools import partial
from pathlib import Path

import pytest
import torch

from app import engines
from app.errors import DataError, DeviceError
from app.model import weights
from tests.conftest import CLASSES
from training import distillation, metrics
from training.calibration import uncalibrated
from training.recipe import Recipe

IMAGES = torch.randint(0, 256, (8, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
INDEX = torch.tensor([5, 2])


@pytest.fixture
def sharpened_weights(tiny_weights: Path, tmp_path: Path) -> Path:
    """The tiny weights with a calibration that changes their probabilities."""
    loaded = weights.load(tiny_weights)
    path = tmp_path / "teacher.safetensors"
    card = loaded.card.model_copy(update={"temperature": 0.5, "label_smoothing_correction": 0.2})
    engine = engines.load(loaded, name="torch", precision="float32")
    logits = torch.from_numpy(engine(loaded.reference_images).probabilities).log()
    from app.engines.pytorch import calibrated_softmax

    weights.save(path, card, loaded.state, loaded.reference_images, calibrated_softmax(logits, 0.5, 0.2).numpy())
    return path


def test_recipe_without_teacher_has_none() -> None:
    assert distillation.load_teacher(Recipe(), CLASSES, IMAGES) is None


def test_cached_teacher_averages_six_views_once(sharpened_weights: Path) -> None:
    loaded = weights.load(sharpened_weights)
    teacher = distillation.load_teacher(Recipe(teacher=str(sharpened_weights)), CLASSES, IMAGES)
    assert teacher is not None
    assert teacher.name == f"tiny {loaded.version}"
    predict = partial(metrics.predict, engines.load(loaded))
    expected = (metrics.flip_translate_tta(predict, IMAGES) / 2).softmax(1)
    torch.testing.assert_close(teacher(INDEX, torch.zeros(0)), expected[INDEX])


def test_teacher_runs_on_the_given_device(tiny_weights: Path) -> None:
    with pytest.raises(DeviceError, match="cuda:63 is not available here"):
        distillation.load_teacher(Recipe(teacher=str(tiny_weights)), CLASSES, IMAGES, "cuda:63")


def test_online_teacher_is_uncalibrated_and_sees_the_batch(sharpened_weights: Path) -> None:
    recipe = Recipe(teacher=str(sharpened_weights), online_teacher=True, distill_temperature=1)
    teacher = distillation.load_teacher(recipe, CLASSES, IMAGES)
    assert teacher is not None
    predict = partial(metrics.predict, engines.load(uncalibrated(weights.load(sharpened_weights))))
    torch.testing.assert_close(teacher(INDEX, IMAGES[:2]), metrics.flip_tta(predict, IMAGES[:2]).softmax(1))


@pytest.mark.slow
def test_online_teacher_can_be_a_cascade(cascade_weights: Path) -> None:
    recipe = Recipe(teacher=str(cascade_weights), online_teacher=True, distill_temperature=1)
    teacher = distillation.load_teacher(recipe, CLASSES, IMAGES)
    assert teacher is not None
    predict = partial(metrics.predict, engines.load(weights.load(cascade_weights)))
    torch.testing.assert_close(teacher(INDEX, IMAGES[:2]), metrics.flip_tta(predict, IMAGES[:2]).softmax(1))


@pytest.mark.parametrize(("classes", "size"), [(CLASSES[:9], 32), (CLASSES, 24)])
def test_teacher_of_other_classes_or_size_is_rejected(tiny_weights: Path, classes: list[str], size: int) -> None:
    with pytest.raises(DataError, match="has other classes or another input size"):
        distillation.load_teacher(Recipe(teacher=str(tiny_weights)), classes, IMAGES[:, :size, :size])
