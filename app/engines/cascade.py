"""A cascade of networks as one engine: an image leaves after the first stage that is confident of it.

Early exit by a threshold on the top probability follows Teerapittayanon et al. 2016 (BranchyNet, arXiv 1709.01686) and
Wang et al. 2022 ("Wisdom of Committees", arXiv 2012.01988); a stage may average the log-probabilities of the last ones.
"""

from collections.abc import Sequence
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from app.engines.base import Engine, Output, join, pad
from app.model.calibration import calibrated_softmax
from app.model.card import Stage

Array = NDArray[np.float32]

PROBABILITY_FLOOR = np.float32(1e-12)  # replaces a probability that was rounded to 0 before its logarithm

# Cost of a pass beyond that of its images, in images of 0.90 GFLOPs: 0.25 on Zen 4, 1.3 on a Xeon with AMX, by the
# times of one and eight images in docs/model-card.md. Elsewhere passes are padded and never split (not measured).
PASS_OVERHEAD = {"cpu": 0.75}


class CascadeEngine:
    """Runs `stages` over engines whose outputs are uncalibrated probabilities.

    Every stage runs on the images that are left only, in passes of prepared batch sizes, the last one padded. The
    probabilities of an image do not depend on the others in its batch where those of the networks do not, as with
    OpenVINO. `early_exit` False runs all stages.
    """

    def __init__(self, networks: Sequence[Engine], stages: Sequence[Stage], early_exit: bool = True) -> None:
        first = networks[0]
        self.name, self.device, self.streams = first.name, first.device, first.streams
        self.precision = first.precision
        self.early_exit = early_exit
        self._networks = networks
        self._stages = stages
        self._passes: list[list[int]] = []  # by number of images: batch sizes

    def prepare(self, sizes: Sequence[int], image: NDArray[np.uint8]) -> None:
        for network in self._networks:
            network.prepare(sizes, image)
        self._passes = plan_passes(sizes, PASS_OVERHEAD.get(self.device, max(sizes, default=0)))

    def memory(self) -> tuple[int, int] | None:
        return self._networks[0].memory()

    def __call__(self, images: NDArray[np.uint8], exclusive: bool = True) -> Output:
        return self.run_stages(images, self.early_exit, exclusive)[-1]

    def run_stages(self, images: NDArray[np.uint8], early_exit: bool, exclusive: bool = True) -> list[Output]:
        """The output after each stage; an image that has left keeps the probabilities of its exit."""
        left = np.arange(len(images))
        history: list[Array] = []  # log-probabilities of the stages so far, for the images that are left
        probabilities = np.empty((len(images), 0), np.float32)
        exits = np.zeros(len(images), np.uint8)
        outputs: list[Output] = []
        ood: Array | None = None
        for index, stage in enumerate(self._stages):
            if len(left):
                passes = self._run_passes(stage, images[left], exclusive)
                if not index:  # every image passes the first network, so that its scores are comparable
                    ood = passes.ood
                history.append(np.log(np.maximum(passes.probabilities, PROBABILITY_FLOOR)))
                logits: Array = np.mean(history[-stage.average_last :], axis=0, dtype=np.float32)
                stage_probabilities = calibrated_softmax(logits, stage.temperature, stage.label_smoothing_correction)
                if not index:
                    probabilities = stage_probabilities
                probabilities[left], exits[left] = stage_probabilities, index
                if early_exit and stage.threshold is not None:
                    stays = stage_probabilities.max(1) < np.float32(stage.threshold)
                    left, history = left[stays], [each[stays] for each in history]
            outputs.append(Output(probabilities.copy(), exits.copy(), ood))
        return outputs

    def _run_passes(self, stage: Stage, images: NDArray[np.uint8], exclusive: bool) -> Output:
        count = len(images)
        if stage.hflip:
            images = images[:, :, ::-1]
        sizes = self._passes[count] if count < len(self._passes) else [count]
        network = self._networks[stage.network]
        starts = accumulate(sizes, initial=0)
        parts = [pad(images[start : start + size], [size]) for start, size in zip(starts, sizes, strict=False)]
        probabilities, stages, ood = join([network(part, exclusive) for part in parts])
        return Output(probabilities[:count], stages[:count], None if ood is None else ood[:count])


def plan_passes(sizes: Sequence[int], overhead: float) -> list[list[int]]:
    """For every number of images up to the largest of `sizes`, the sizes of the passes with the least cost.

    A pass of n images costs n + `overhead`. The sum of the sizes is at least the number of images.
    """
    passes: list[list[int]] = [[]]
    costs = [0.0]
    for count in range(1, max(sizes, default=0) + 1):
        cost, size = min((size + overhead + costs[max(0, count - size)], size) for size in sizes)
        costs.append(cost)
        passes.append([size, *passes[max(0, count - size)]])
    return [sorted(each, reverse=True) for each in passes]
