"""From logits to calibrated probabilities: the one definition, and its NumPy form.

Softmax with one temperature T for all classes (Guo et al. 2017, arXiv 1706.04599), then the correction for label
smoothing. A network trained on targets (1 - s) * onehot + s / K, with K classes, learns that mixture, so s / K is
subtracted again. A difference near or below 0 is replaced by a share of the probability itself, which keeps the order:

    p = softmax(logits / T)
    q = max(p - s / K, SMOOTHING_FLOOR * p)
    probabilities = q / sum(q)

`app.engines.pytorch.calibrated_softmax` is the torch form, `app.engines.openvino.calibrated_softmax` the graph form. A
test compares both with this one.
"""

import numpy as np
from numpy.typing import NDArray

SMOOTHING_FLOOR = 0.01  # share of a probability that remains at least, so that the order of the classes stays


def calibrated_softmax(
    logits: NDArray[np.float32], temperature: float, smoothing_correction: float
) -> NDArray[np.float32]:
    """Calibrated probabilities for logits, both float32 [N, classes]."""
    scaled = logits / np.float32(temperature)
    exponentials = np.exp(scaled - scaled.max(1, keepdims=True))
    softmax = exponentials / exponentials.sum(1, keepdims=True)
    floor = np.float32(smoothing_correction / logits.shape[1])
    corrected = np.maximum(softmax - floor, softmax * np.float32(SMOOTHING_FLOOR))
    probabilities: NDArray[np.float32] = corrected / corrected.sum(1, keepdims=True)
    return probabilities
