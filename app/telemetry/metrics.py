"""Every metric's name, help and buckets, in one place and one registry of its own.

Several workers store their values in one folder, named by FOLDER in the environment. Each of them renders the sum.
"""

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

from app.model.ood import is_ood
from app.telemetry.processes import Processes, living

FOLDER = "PROMETHEUS_MULTIPROC_DIR"  # read by the library at import

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

SECONDS = (0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


# probabilities [classes], exit stage, out-of-distribution score, brightness, more
Scored = tuple[NDArray[np.float32], int, float | None, float, object]


class Timings(NamedTuple):
    """Seconds of the steps of a prediction request; `start` of the first step by time.perf_counter."""

    start: float
    decode_s: float
    queue_s: float
    inference_s: float


class Metrics:
    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        counter = partial(Counter, registry=self.registry)
        gauge = partial(Gauge, registry=self.registry)
        histogram = partial(Histogram, buckets=SECONDS, registry=self.registry)
        self.requests = counter("thirtytwo_requests", "HTTP requests by route and status.", ["route", "status"])
        self.latency = histogram(
            "thirtytwo_request_duration_seconds", "From request head to last response byte.", ["route"]
        )
        self.queue = gauge(
            "thirtytwo_queue_size", "Images that are being decoded or wait for a batch.", multiprocess_mode="livesum"
        )
        self.queue_limit = gauge(
            "thirtytwo_queue_limit", "Queue size at which requests are rejected.", multiprocess_mode="livesum"
        )
        self.queue_wait = histogram("thirtytwo_queue_seconds", "From the end of decoding to the first batch.")
        self.decode = histogram("thirtytwo_decode_seconds", "Decoding of all files of a request.")
        self.batch_size = histogram("thirtytwo_batch_size", "Images per forward pass.", buckets=SIZES)
        self.model = histogram("thirtytwo_inference_seconds", "Duration of one forward pass.")
        self.predictions = counter("thirtytwo_predictions", "Predicted images by class.", ["label"])
        self.confidence = counter(
            "thirtytwo_confidence_sum",
            "Sum of the predicted classes' probabilities; divided by the predictions: mean confidence.",
            ["label"],
        )
        self.exits = counter("thirtytwo_exits", "Images by the stage of the cascade after which they left.", ["stage"])
        self.ood = counter(
            "thirtytwo_ood", "Images whose out-of-distribution score is above 0.95; 5 % of validation images are."
        )
        self.expected_exit_share = gauge(
            "thirtytwo_expected_exit_share",
            "Share of validation images that left the cascade after this stage; absent or 0 without early exit.",
            ["stage"],
            multiprocess_mode="livemostrecent",
        )
        self.drift_psi = gauge(
            "thirtytwo_drift_psi",
            "Population stability index of the last 1,000 to 10,000 images against held-out images; absent before.",
            ["feature"],
            multiprocess_mode="livemax",
        )
        self.drift_psi_critical = gauge(
            "thirtytwo_drift_psi_critical",
            "The index that one in 1,000 samples of that size exceeds without drift.",
            ["feature"],
            multiprocess_mode="livemax",
        )
        self.rejections = counter("thirtytwo_rejections", "Rejected files and requests by problem type.", ["reason"])
        self.log_lines_dropped = counter(
            "thirtytwo_log_lines_dropped", "Log lines that could not be written to stderr."
        )
        self.model_info = gauge(
            "thirtytwo_model_info",
            "1 for the model that serves; the labels name it, its engine, device and precision.",
            ["name", "version", "engine", "device", "precision"],
            multiprocess_mode="livemax",
        )
        self.key_images = counter(
            "thirtytwo_key_images",
            "Images by the name of the API key: accepted, or refused by its rate limit or the queue.",
            ["name", "outcome"],
        )
        self.loads = counter(
            "thirtytwo_model_loads",
            "Loads of the weights file after the start: success, unchanged (the same version) or failure.",
            ["outcome"],
        )
        self.shadow_images = counter(
            "thirtytwo_shadow_images",
            "Images that the shadow ran, by predicted class of the model that serves and whether the shadow agrees.",
            ["label", "agrees"],
        )
        self.shadow_seconds = histogram("thirtytwo_shadow_seconds", "Duration of one pass of the shadow.")
        self.device_memory = gauge(
            "thirtytwo_device_memory_bytes",
            "Memory of the GPU: used by any process, and total; absent on a CPU.",
            ["device", "state"],
            multiprocess_mode="livemostrecent",
        )
        self.capacity = gauge(
            "thirtytwo_capacity_images_per_second",
            "Images/s of the engine in full batches, at the speed of the last minute's batches.",
            multiprocess_mode="livesum",  # the engine process alone sets it
        )
        self.utilization = gauge(
            "thirtytwo_utilization_ratio",
            "Share of each resource in use over the last minute; the highest limits the instance.",
            ["resource"],
            multiprocess_mode="livemax",
        )
        for outcome in ("success", "unchanged", "failure"):  # so that the first failure is a rise from 0
            self.loads.labels(outcome)
        self._model: tuple[str, ...] = ()  # labels of `model_info`
        self._expected_stages = 0
        self._utilization: dict[str, float] = {}  # by resource
        self._of_route: dict[tuple[str, int], tuple[Counter, Histogram]] = {}
        self._of_class: dict[str, tuple[Counter, Counter]] = {}  # of all models that have served
        self._of_stage: dict[int, Counter] = {}
        self._of_key: dict[tuple[str, bool], Counter] = {}

    def describe_model(self, classes: Sequence[str], stages: int) -> None:
        """Every class and stage has a count from the start, so that the first image is a rise from 0.

        A class of a former model keeps its count: requests that started on that model may still finish.
        """
        self._of_class |= {name: (self.predictions.labels(name), self.confidence.labels(name)) for name in classes}
        self._of_stage |= {stage: self.exits.labels(stage) for stage in range(stages)}

    def name_model(
        self, name: str, version: str, engine: str, device: str, precision: str, exit_shares: Sequence[float] = ()
    ) -> None:
        """Sets `model_info` for the model that serves from now on; `exit_shares` of validation images, by stage."""
        former, self._model = self._model, (name, version, engine, device, precision)
        if former and FOLDER in os.environ:
            self.model_info.labels(*former).set(0)  # the library removes no labels of several processes
        elif former:
            self.model_info.remove(*former)
        self.model_info.labels(*self._model).set(1)
        self._expected_stages = max(self._expected_stages, len(exit_shares))
        for stage in range(self._expected_stages):  # no image reaches a stage that only a former model had
            self.expected_exit_share.labels(stage).set(exit_shares[stage] if stage < len(exit_shares) else 0.0)

    def observe_request(self, route: str, status: int, seconds: float) -> None:
        if (route, status) not in self._of_route:  # looking labels up costs more than counting
            self._of_route[route, status] = self.requests.labels(route, status), self.latency.labels(route)
        requests, latency = self._of_route[route, status]
        requests.inc()
        latency.observe(seconds)

    def observe_timings(self, timings: Timings) -> None:
        self.decode.observe(timings.decode_s)
        self.queue_wait.observe(timings.queue_s)

    def observe_batch(self, size: int, seconds: float) -> None:
        self.batch_size.observe(size)
        self.model.observe(seconds)

    def observe_predictions(self, classes: Sequence[str], predictions: Sequence[Scored]) -> None:
        """Counts predicted classes, confidences and exit stages; the classes in the order of the probabilities."""
        for probabilities, stage, ood, _, _ in predictions:
            top = int(probabilities.argmax())
            count, confidence = self._of_class[classes[top]]
            count.inc()
            confidence.inc(float(probabilities[top]))
            self._of_stage[stage].inc()
            if is_ood(ood):
                self.ood.inc()

    def observe_key(self, name: str, images: int, accepted: bool) -> None:
        if (name, accepted) not in self._of_key:
            self._of_key[name, accepted] = self.key_images.labels(name, "accepted" if accepted else "refused")
        self._of_key[name, accepted].inc(images)

    def observe_shadow(self, labels: Sequence[tuple[str, bool]], seconds: float) -> None:
        for label, agrees in labels:
            self.shadow_images.labels(label, str(agrees).lower()).inc()
        self.shadow_seconds.observe(seconds)

    def observe_drift(self, feature: str, index: float, critical: float) -> None:
        self.drift_psi.labels(feature).set(index)
        self.drift_psi_critical.labels(feature).set(critical)

    def observe_utilization(self, resource: str, ratio: float) -> None:
        self._utilization[resource] = ratio
        self.utilization.labels(resource).set(ratio)

    def observe_engine(self, images_per_s: float, utilization: float) -> None:
        self.capacity.set(images_per_s)
        self.observe_utilization("engine", utilization)

    @property
    def highest_utilization(self) -> float:
        """Of this process's resources; 0 before the first observation."""
        return max(self._utilization.values(), default=0.0)

    def observe_memory(self, device: str, used: int, total: int) -> None:
        self.device_memory.labels(device, "used").set(used)
        self.device_memory.labels(device, "total").set(total)

    def render(self) -> bytes:
        folder = os.environ.get(FOLDER)
        if folder is None:
            return generate_latest(self.registry)
        everyone = CollectorRegistry()
        MultiProcessCollector(everyone, folder)
        everyone.register(Processes(living(Path(folder))))
        return generate_latest(everyone)
