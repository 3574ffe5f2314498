"""The service with an engine that fails on request.

As a subprocess: `python -m tests.support.fault_injection FAULT WEIGHTS PORT [WORKERS]`. In a test: `load`.

A white image triggers the fault; other images get the real engine's results.
"""

import os
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import uvicorn
from numpy.typing import NDArray

from app.application import create_app
from app.engines import Engine, Output
from app.errors import DeviceLostError
from app.http.http_protocol import Protocol
from app.model.weights import Weights
from app.process.server import Server, listen
from app.process.supervisor import Supervisor
from app.settings import Settings
from app.sources import LoadEngine, load_engine
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


def lost(probabilities: NDArray[np.float32], white: NDArray[np.bool_]) -> NDArray[np.float32]:
    if white.any():
        raise DeviceLostError("CUDA error: device-side assert triggered")
    return probabilities


def load(fault: Fault) -> LoadEngine:
    return partial(_load_faulty, fault)


def _load_faulty(fault: Fault, weights: Weights, settings: Settings) -> Engine:
    return FaultyEngine(load_engine(weights, settings), fault)


def main() -> None:
    fault, weights, port = globals()[sys.argv[1]], sys.argv[2], int(sys.argv[3])
    workers = int(sys.argv[4]) if len(sys.argv) > 4 else 1
    os.environ.setdefault("THIRTYTWO_INFERENCE_TIMEOUT_S", "0.5")
    settings = Settings(weights=weights, max_batch=16)
    sockets, log_config = listen("127.0.0.1", port), logs.config("info", "text")
    options = {"http": Protocol, "lifespan": "on", "log_config": log_config}
    shutdown_timeout_s = int(os.environ.get("TEST_SHUTDOWN_TIMEOUT_S", SHUTDOWN_TIMEOUT_S))
    options |= {"timeout_graceful_shutdown": shutdown_timeout_s}
    if workers == 1:
        Server(uvicorn.Config(create_app(settings, load(fault)), **options)).run(sockets)
        return
    config = uvicorn.Config(partial(create_app, settings), factory=True, workers=workers, **options)
    Supervisor(config, sockets, settings, load(fault)).run()


if __name__ == "__main__":
    main()
