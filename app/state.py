"""What the lifespan builds and the routes use: one frozen object, reached by one alias."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from fastapi import Depends, Request
from numpy.typing import NDArray

from app.api.auth import Keys
from app.inference.batcher import Batcher
from app.inference.classifier import Classifier
from app.lifecycle import Lifecycle
from app.model.preprocessing import Pixels
from app.oip.statistics import Statistics
from app.settings import Settings
from app.telemetry.metrics import Metrics


@dataclass(frozen=True)
class State:
    settings: Settings
    lifecycle: Lifecycle
    metrics: Metrics
    keys: Keys
    statistics: Statistics
    classifier: Classifier
    batcher: Batcher[Pixels, NDArray[np.float32]]
    decoders: ThreadPoolExecutor


async def current(request: Request) -> State:
    state: State = request.state.service
    return state


Service = Annotated[State, Depends(current)]
