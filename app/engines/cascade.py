"""A cascade of networks as one engine: an image leaves after the first stage that is confident of it.

Early exit by a threshold on the top probability follows Teerapittayanon et al. 2016 (BranchyNet, arXiv 1709.01686) and
Wang et al. 2022 ("Wisdom of Committees", arXiv 2012.01988); a stage may average the log-probabilities of the last ones.
"""

from bisect import bisect_left
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from app.engines.base import Engine, Output
from app.model.calibration import calibrated_softmax
from app.model.card import Stage

Array = NDArray[np.float32]

PROBABILITY_FLOOR = np.float32(1e-12)  # replaces a probability that was rounded to 0 before its logarithm


class CascadeEngine:
    """Runs `stages` over engines whose outputs are uncalibrated probabilities.

    Every stage runs on the images that are left only, padded to a prepared batch size. The probabilities of an image do
    not depend on the others in its batch. `early_exit` False runs every image through every stage.
    """

    def __init__(self, networks: Sequence[Engine], stages: Sequence[Stage], early_exit: bool = True) -> None:
        first = networks[0]
        self.name, self.device, self.streams = first.name, first.device, first.streams
        self.precision = first.precision
        self.early_exit = early_exit
        self._networks = networks
        self._stages = stages
        self._sizes: list[int] = []

    def prepare(self, sizes: Sequence[int], image: NDArray[np.uint8]) -> None:
        for network in self._networks:
            network.prepare(sizes, image)
        self._sizes = sorted(sizes)

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
        for index, stage in enumerate(self._stages):
            if len(left):
                history.append(self._log_probabilities(stage, images[left], exclusive))
                logits: Array = np.mean(history[-stage.average_last :], axis=0, dtype=np.float32)
                stage_probabilities = calibrated_softmax(logits, stage.temperature, stage.label_smoothing_correction)
                if not index:
                    probabilities = stage_probabilities
                probabilities[left], exits[left] = stage_probabilities, index
                if early_exit and stage.threshold is not None:
                    stays = stage_probabilities.max(1) < np.float32(stage.threshold)
                    left, history = left[stays], [each[stays] for each in history]
            outputs.append(Output(probabilities.copy(), exits.copy()))
        return outputs

    def _log_probabilities(self, stage: Stage, images: NDArray[np.uint8], exclusive: bool) -> Array:
        count = len(images)
        if stage.hflip:
            images = images[:, :, ::-1]
        position = bisect_left(self._sizes, count)
        if position < len(self._sizes):  # a size that is not prepared would be compiled now
            padding = np.zeros((self._sizes[position] - count, *images.shape[1:]), np.uint8)
            images = np.concatenate([images, padding])
        output = self._networks[stage.network](np.ascontiguousarray(images), exclusive)
        log_probabilities: Array = np.log(np.maximum(output.probabilities[:count], PROBABILITY_FLOOR))
        return log_probabilities
