"""The service with an engine that loses its device at a white image.

    python -m benchmarks.gpu.faulty_service DEVICE PORT

On a GPU the image triggers a device-side assert, after which every CUDA call of the process fails.
"""

import sys
from collections.abc import Sequence

import torch
import uvicorn

from app.application import create_app
from app.engines import Engine, Output
from app.errors import DeviceLostError
from app.http.http_protocol import Protocol
from app.model.weights import Weights
from app.process.server import Server, listen
from app.settings import Settings
from app.sources import load_engine
from benchmarks.images import Images


class FaultyEngine:
    def __init__(self, real: Engine) -> None:
        self.name, self.device, self.precision, self.streams = real.name, real.device, real.precision, real.streams
        self._real = real

    def __call__(self, images: Images, exclusive: bool = True) -> Output:
        if (images == 255).all((1, 2, 3)).any():
            self._lose_device()
        return self._real(images, exclusive)

    def prepare(self, sizes: Sequence[int], image: Images) -> None:
        self._real.prepare(sizes, image)

    def memory(self) -> tuple[int, int] | None:
        return self._real.memory()

    def _lose_device(self) -> None:
        if not self.device.startswith("cuda"):
            raise DeviceLostError("CUDA error: device-side assert triggered (simulated)")
        index = torch.tensor([9], device=self.device)
        torch.zeros(4, device=self.device)[index].sum().item()


def load_faulty(weights: Weights, settings: Settings) -> Engine:
    return FaultyEngine(load_engine(weights, settings))


def main() -> None:
    device, port = sys.argv[1], int(sys.argv[2])
    app = create_app(Settings(device=device, engine="torch", max_batch=16), load_faulty)
    Server(uvicorn.Config(app, http=Protocol, lifespan="on", log_level="warning")).run(listen("127.0.0.1", port))


if __name__ == "__main__":
    main()
