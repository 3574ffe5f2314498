"""Time of a call of the engine process from a front end, without the network's own time.

python -m benchmarks.remote_engine
"""

import multiprocessing
import socket
import time

import numpy as np

from app.engines import Output, channel
from app.engines.batch_cost import BatchCost
from app.engines.channel import REQUEST, Description, Layout
from app.engines.remote import RemoteEngine
from app.engines.server import EngineModel, EngineServer
from app.model import weights
from benchmarks.images import Images

MAX_BATCH = 64
COST = BatchCost(0.0, 0.0, MAX_BATCH)  # has no effect here
CALLS, WARM_UP_CALLS = 3000, 200


def respond(images: Images, exclusive: bool) -> Output:
    """Zeros at once: what is left is the way there and back."""
    return Output(np.zeros((len(images), 10), np.float32), np.zeros(len(images), np.uint8))


def serve(link: socket.socket) -> None:
    bundled = weights.load(weights.BUNDLED)
    card = bundled.card.model_dump(mode="json")
    description = Description("none", "cpu", "float32", bundled.sha256, card, Layout(MAX_BATCH, 32, 10), COST, 1)
    server = EngineServer(MAX_BATCH)
    server.start()
    channel.receive(link, REQUEST.size)
    server.add(channel.offer(link, description), EngineModel(respond, lambda: None))
    link.recv(1)  # until the front end exits


def main() -> None:
    engine_end, front_end = socket.socketpair()
    process = multiprocessing.get_context("spawn").Process(target=serve, args=(engine_end,), daemon=True)
    process.start()
    engine_end.close()
    engine = RemoteEngine(front_end)
    print("| images | median µs | 90th percentile µs |\n| ---: | ---: | ---: |")
    for count in (1, 8, MAX_BATCH):
        images = np.zeros((count, 32, 32, 3), np.uint8)
        for _ in range(WARM_UP_CALLS):
            engine(images)
        times_us = np.array([_call_us(engine, images) for _ in range(CALLS)])
        median, high = np.quantile(times_us, (0.5, 0.9))
        print(f"| {count} | {median:.1f} | {high:.1f} |")
    engine.close()
    front_end.close()


def _call_us(engine: RemoteEngine, images: Images) -> float:
    start = time.perf_counter()
    engine(images)
    return (time.perf_counter() - start) * 1e6


if __name__ == "__main__":
    main()
