"""Every metric's name, help and buckets, in one place and one registry of its own.

Several workers keep their values in files of one folder, named by FOLDER in the environment, and whichever is asked
answers for all.
"""

import os
import re
from pathlib import Path

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead

FOLDER = "PROMETHEUS_MULTIPROC_DIR"  # the library's own name; it looks at it when it is imported

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


class Metrics:
    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter("thirtytwo_requests", "Requests answered.", ["route", "status"], registry=self.registry)
        self.latency = Histogram(
            "thirtytwo_request_seconds", "From head to last byte.", ["route"], buckets=SECONDS, registry=self.registry
        )
        self.queue = Gauge(
            "thirtytwo_queue_images",
            "Images waiting for the model.",
            multiprocess_mode="livesum",
            registry=self.registry,
        )
        self.queue_wait = Histogram(
            "thirtytwo_queue_seconds", "Wait until the first batch.", buckets=SECONDS, registry=self.registry
        )
        self.decode = Histogram(
            "thirtytwo_decode_seconds", "Decoding of a request.", buckets=SECONDS, registry=self.registry
        )
        self.batch_size = Histogram(
            "thirtytwo_batch_images", "Images in one pass of the network.", buckets=SIZES, registry=self.registry
        )
        self.model = Histogram(
            "thirtytwo_model_seconds", "One pass of the network.", buckets=SECONDS, registry=self.registry
        )
        self.predictions = Counter(
            "thirtytwo_predictions", "Images by predicted class.", ["label"], registry=self.registry
        )
        self.refusals = Counter(
            "thirtytwo_refused_files", "Files and requests refused, by reason.", ["reason"], registry=self.registry
        )
        self.model_info = Gauge(
            "thirtytwo_model_info",
            "1, with the model in the labels.",
            ["name", "version", "engine", "device", "precision"],
            multiprocess_mode="livemax",
            registry=self.registry,
        )

    def observe_batch(self, size: int, seconds: float) -> None:
        self.batch_size.observe(size)
        self.model.observe(seconds)

    def render(self) -> bytes:
        folder = os.environ.get(FOLDER)
        if folder is None:
            return generate_latest(self.registry)
        _forget_the_dead(Path(folder))
        everyone = CollectorRegistry()
        MultiProcessCollector(everyone, folder)
        return generate_latest(everyone)


def _forget_the_dead(folder: Path) -> None:
    """Drops what workers that are gone said of the present; what they counted stays."""
    for file in folder.glob("gauge_live*.db"):
        match = re.search(r"_(\d+)\.db$", file.name)
        if match and not Path(f"/proc/{match[1]}").exists():
            mark_process_dead(int(match[1]), str(folder))
