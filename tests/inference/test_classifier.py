"""The classifier's calls of its engine."""

from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from app.engines import Output
from app.errors import WeightsError
from app.inference.classifier import Classifier
from tests.conftest import untrained


class Recorder:
    """An engine whose probability of class 0 is the first value of the image."""

    name, device, precision, streams = "recorder", "cpu", "float32", 1

    def __init__(self, scored: bool) -> None:
        self.calls: list[int] = []
        self.exclusive: list[bool] = []
        self._scored = scored

    def __call__(self, images: NDArray[np.uint8], exclusive: bool = True) -> Output:
        self.calls.append(len(images))
        self.exclusive.append(exclusive)
        first = images[:, 0, 0, 0].astype(np.float32)
        return Output(np.stack([first] * 10, 1), images[:, 0, 0, 1], first if self._scored else None)

    def prepare(self, sizes: Sequence[int], image: NDArray[np.uint8]) -> None:
        pass

    def memory(self) -> None:
        return None


@pytest.mark.parametrize("scored", [True, False])
def test_no_call_exceeds_the_largest_batch_size(scored: bool) -> None:
    engine = Recorder(scored)
    classifier = Classifier(untrained("tiny", 8), engine, [1, 2, 4])
    images = np.arange(10 * 32 * 32 * 3).astype(np.uint8).reshape(10, 32, 32, 3)
    images[:, 0, 0, 0], images[:, 0, 0, 1] = range(10), range(10, 20)
    output = classifier.run(images)
    assert engine.calls == [4, 4, 2]
    assert output.probabilities[:, 0].tolist() == list(range(10))
    assert output.stages.tolist() == list(range(10, 20))
    assert (output.ood is None) is not scored


def test_verification_may_run_beside_an_exclusive_batch() -> None:
    engine = Recorder(False)
    with pytest.raises(WeightsError):
        Classifier(untrained("tiny", 8), engine, [1, 2, 4]).verify()
    assert engine.exclusive == [False]
