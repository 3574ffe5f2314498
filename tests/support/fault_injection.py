"""The service with an engine that fails on request.

As a subprocess: `python -m tests.support.fault_injection FAULT WEIGHTS PORT`. In a test: `load`.

A white image triggers the fault; other images get the real engine's results.
"""

import os
import sys
import time
from collections.abc import Callable, Sequence

import numpy as np
import uvicorn
from numpy.typing import NDArray

from app.application import create_app
from app.engines import Engine, Output
from app.http.http_protocol import Protocol
from app.lifespan import LoadEngine, load_engine
from app.model.weights import Weights
from app.process.server import Server, listen
from app.settings import Settings
from app.telemetry import logs


def raising(probabilities: NDArray[np.float32], white: NDArray[np.bool_]) -> NDArray[np.float32]:
    if white.any():
        raise ValueError("secret detail of the engine")
    return probabilities


def poisoned(probabilities: NDArray[np.float32], white: NDArray[np.bool_]) -> NDArray[np.float32]:
    return np.where(white[:, None], np.nan, probabilities)


def cramped(probabilities: NDArray[np.float32], white: NDArray[np.bool_]) -> NDArray[np.float32]:
    if len(white) > 4 and white.any():
        raise MemoryError
    return probabilities


def hanging(probabilities: NDArray[np.float32], white: NDArray[np.bool_]) -> NDArray[np.float32]:
    if white.any():
        time.sleep(3600)
    return probabilities


def dying(probabilities: NDArray[np.float32], white: NDArray[np.bool_]) -> NDArray[np.float32]:
    if white.any():
        raise SystemExit  # ends the thread; other exceptions do not
    return probabilities


def slow(probabilities: NDArray[np.float32], white: NDArray[np.bool_]) -> NDArray[np.float32]:
    time.sleep(0.01 * len(white))
    return probabilities


SHUTDOWN_TIMEOUT_S = 2
Fault = Callable[[NDArray[np.float32], NDArray[np.bool_]], NDArray[np.float32]]


class FaultyEngine:
    def __init__(self, real: Engine, fault: Fault) -> None:
        self.name, self.device, self.precision, self.streams = real.name, real.device, real.precision, real.streams
        self._real = real
        self._fault = fault

    def __call__(self, images: NDArray[np.uint8], exclusive: bool = True) -> Output:
        output = self._real(images, exclusive)
        return output._replace(probabilities=self._fault(output.probabilities, (images == 255).all((1, 2, 3))))

    def prepare(self, sizes: Sequence[int], image: NDArray[np.uint8]) -> None:
        self._real.prepare(sizes, image)

    def memory(self) -> tuple[int, int] | None:
        return self._real.memory()


def load(fault: Fault) -> LoadEngine:
    def load_faulty(weights: Weights, settings: Settings) -> Engine:
        return FaultyEngine(load_engine(weights, settings), fault)

    return load_faulty


def main() -> None:
    fault, weights, port = globals()[sys.argv[1]], sys.argv[2], int(sys.argv[3])
    os.environ.setdefault("THIRTYTWO_INFERENCE_TIMEOUT_S", "0.5")
    app = create_app(Settings(weights=weights, max_batch=16), load(fault))
    log_config = logs.config("info", "text")
    config = uvicorn.Config(
        app, http=Protocol, lifespan="on", log_config=log_config, timeout_graceful_shutdown=SHUTDOWN_TIMEOUT_S
    )
    Server(config).run(listen("127.0.0.1", port))


if __name__ == "__main__":
    main()
