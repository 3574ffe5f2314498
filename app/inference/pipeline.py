"""The looks that the network takes at a request's pictures: one each, two where `model.doubt` asks for it."""

from collections.abc import Collection, Sequence
from time import monotonic

import numpy as np
from numpy.typing import NDArray

from app.errors import DeadlineExceeded, NotReady
from app.inference.batcher import Answer, Batcher
from app.model import tta
from app.model.preprocessing import Pixels

Probabilities = NDArray[np.float32]


async def take(
    batcher: Batcher[Pixels, Probabilities],
    pixels: Sequence[Pixels],
    lossy: Collection[int],
    sure: float,
    timeout_s: float,
) -> Answer[Probabilities]:
    """Probabilities of each picture; those at the places `lossy` may get a second look. Raises what `submit` raises.

    Where second looks come too late, what is known after the first ones is the answer.
    """
    deadline = monotonic() + timeout_s
    first = await batcher.submit(pixels, timeout_s)
    doubtful = [place for place in lossy if tta.in_doubt(first.results[place], sure)]
    if not doubtful:
        return first
    try:
        mirrored = [tta.mirrored(pixels[place]) for place in doubtful]
        second = await batcher.submit(mirrored, max(0.0, deadline - monotonic()), again=True)
    except (NotReady, DeadlineExceeded):
        return first
    results = list(first.results)
    for place, probabilities in zip(doubtful, second.results, strict=True):
        results[place] = tta.merged(results[place], probabilities)
    return Answer(results, first.queue_s + second.queue_s, first.run_s + second.run_s)
