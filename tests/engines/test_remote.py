"""`RemoteEngine` and `EngineServer` over shared memory, in one process: results, merging, errors, exits."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from app import engines
from app.engines import channel
from app.engines.base import Output
from app.engines.batch_cost import BatchCost
from app.engines.channel import Description, Layout
from app.engines.remote import RemoteEngine
from app.engines.server import EngineModel, EngineServer, Run
from app.errors import DeviceLostError, WeightsError
from app.model import weights
from app.model.weights import Weights
from tests.support.subprocesses import named_shared_memory

CLASSES = 10
MAX_BATCH = 32
COST = BatchCost(0.001, 0.0005, MAX_BATCH)

Images = NDArray[np.uint8]


@pytest.fixture(scope="module")
def tiny(tiny_weights: Path) -> Weights:
    return weights.load(tiny_weights)


def noise(count: int, seed: int = 0) -> Images:
    return np.random.default_rng(seed).integers(0, 256, (count, 32, 32, 3), np.uint8)


def mean_of_pixels(images: Images, exclusive: bool = True) -> Output:
    """A fake engine: every probability is the mean of the image's pixels, the stage is its first pixel modulo 3."""
    means = images.mean((1, 2, 3), dtype=np.float32)
    return Output(np.repeat(means[:, None], CLASSES, 1), images[:, 0, 0, 0] % 3)


def description(tiny: Weights, channels: int = 2) -> Description:
    layout = Layout(MAX_BATCH, 32, CLASSES)
    return Description("fake", "cpu", "int8", tiny.sha256, tiny.card.model_dump(mode="json"), layout, COST, channels)


class Served:
    """A server with one model, and the front ends connected to it."""

    def __init__(self, server: EngineServer, model: EngineModel) -> None:
        self.server = server
        self.model = model
        self.opened: list[RemoteEngine] = []

    def connect(self, description: Description, model: EngineModel | None = None) -> RemoteEngine:
        ours, theirs = socket.socketpair()
        with ours, theirs:
            self.server.add(channel.offer(ours, description), model or self.model)
            remote = RemoteEngine(theirs)
        self.opened.append(remote)
        return remote


@contextmanager
def serving(
    run: Run = mean_of_pixels,
    streams: int = 1,
    verify: Callable[[], None] = lambda: None,
    on_batch: Callable[[int, float], None] = lambda images, seconds: None,
    on_close: Callable[[EngineModel], None] = lambda model: None,
) -> Iterator[Served]:
    server = EngineServer(MAX_BATCH, streams, on_batch, on_close)
    served = Served(server, EngineModel(run, verify))
    server.start()
    try:
        yield served
    finally:
        server.close()
        for remote in served.opened:
            remote.close()


class Gate:
    """An engine whose first batch waits until the test opens it; `batches` has the size of each."""

    def __init__(self) -> None:
        self.entered, self.opened = threading.Event(), threading.Event()
        self.batches: list[int] = []

    def __call__(self, images: Images, exclusive: bool = True) -> Output:
        self.batches.append(len(images))
        self.entered.set()
        assert self.opened.wait(30)
        return mean_of_pixels(images)


@pytest.mark.parametrize("file", ["tiny_weights", "cascade_weights", "ood_weights"])
def test_outputs_equal_the_direct_engine_bit_for_bit(file: str, request: pytest.FixtureRequest) -> None:
    loaded = weights.load(request.getfixturevalue(file))
    direct = engines.load(loaded, name="openvino")
    direct.prepare([1, 2, 4, 8, 16, MAX_BATCH], loaded.reference_images[0])
    images = noise(200)
    expected = direct(images)
    with serving(direct, direct.streams) as served, ThreadPoolExecutor(6) as pool:
        fronts = [served.connect(description(loaded)) for _ in range(3)]
        parts = [(fronts[i % 3], images[i * 7 : i * 7 + 7]) for i in range(29)]
        outputs = list(pool.map(lambda part: part[0](part[1]), parts))
    assert np.array_equal(np.concatenate([output.probabilities for output in outputs]), expected.probabilities)
    assert np.array_equal(np.concatenate([output.stages for output in outputs]), expected.stages)
    if expected.ood is None:
        assert all(output.ood is None for output in outputs)
    else:
        assert np.array_equal(np.concatenate([output.ood for output in outputs]), expected.ood)


def test_front_end_has_the_card_and_attributes_of_the_engine(tiny: Weights) -> None:
    with serving() as served:
        remote = served.connect(description(tiny))
    assert (remote.name, remote.device, remote.precision, remote.streams) == ("fake", "cpu", "int8", 2)
    assert remote.weights.card == tiny.card
    assert remote.weights.version == tiny.version
    assert remote.cost == COST
    assert remote.memory() is None


def test_waiting_calls_form_one_batch(tiny: Weights) -> None:
    gate = Gate()
    with serving(gate) as served, ThreadPoolExecutor(5) as pool:
        fronts = [served.connect(description(tiny)) for _ in range(5)]
        calls = [pool.submit(fronts[0], noise(1))]
        assert gate.entered.wait(30)
        calls += [pool.submit(front, noise(8, seed)) for seed, front in enumerate(fronts[1:], 1)]
        time.sleep(1)  # all wait now
        gate.opened.set()
        outputs = [call.result(30) for call in calls]
    assert gate.batches == [1, MAX_BATCH]
    for seed, output in enumerate(outputs[1:], 1):
        assert np.array_equal(output.probabilities, mean_of_pixels(noise(8, seed)).probabilities)


def test_call_that_does_not_fit_waits_for_the_next_batch(tiny: Weights) -> None:
    gate = Gate()
    with serving(gate) as served, ThreadPoolExecutor(4) as pool:
        fronts = [served.connect(description(tiny)) for _ in range(4)]
        calls = [pool.submit(fronts[0], noise(1))]
        assert gate.entered.wait(30)
        calls += [pool.submit(front, noise(20)) for front in fronts[1:]]
        time.sleep(0.2)
        gate.opened.set()
        for call in calls:
            call.result(30)
    assert gate.batches == [1, 20, 20, 20]


@pytest.mark.slow
@pytest.mark.parametrize(("size", "concurrent"), [(MAX_BATCH, 2), (MAX_BATCH - 1, 1)])
def test_second_stream_starts_for_a_full_batch_only(tiny: Weights, size: int, concurrent: int) -> None:
    running = threading.Semaphore(0)
    release = threading.Event()

    def block(images: Images, exclusive: bool) -> Output:
        running.release()
        assert release.wait(30)
        return mean_of_pixels(images)

    with serving(block, 2) as served, ThreadPoolExecutor(2) as pool:
        fronts = [served.connect(description(tiny)) for _ in range(2)]
        calls = [pool.submit(fronts[0], noise(1))]
        assert running.acquire(timeout=30)
        calls.append(pool.submit(fronts[1], noise(size)))
        assert running.acquire(timeout=1.0) == (concurrent == 2)
        release.set()
        for call in calls:
            call.result(30)


@pytest.mark.slow
@given(st.lists(st.integers(1, MAX_BATCH), min_size=1, max_size=12), st.integers(1, 3))
def test_any_sizes_of_calls_get_their_own_results(sizes: list[int], streams: int) -> None:
    card = {"name": "x", "classes": [str(i) for i in range(CLASSES)], "input_size": 32, "architecture": "convnet"}
    card |= {"arguments": {"classes": 10, "widths": [8], "depth": 1}, "parameters": 1, "temperature": 1}
    card |= {"activation_ranges": {}, "test_accuracy": None, "dataset": "noise", "recipe": {}}
    described = Description("fake", "cpu", "int8", "0" * 64, card, Layout(MAX_BATCH, 32, CLASSES), COST, 2)
    with serving(streams=streams) as served, ThreadPoolExecutor(len(sizes)) as pool:
        fronts = [served.connect(described) for _ in range(2)]
        batches = [noise(size, seed) for seed, size in enumerate(sizes)]
        outputs = list(pool.map(lambda i: fronts[i % 2](batches[i]), range(len(sizes))))
    for images, output in zip(batches, outputs, strict=True):
        assert np.array_equal(output.probabilities, mean_of_pixels(images).probabilities)
        assert np.array_equal(output.stages, mean_of_pixels(images).stages)


def test_call_that_fails_leaves_the_others_of_its_batch(tiny: Weights) -> None:
    gate = Gate()

    def fail_on_white(images: Images, exclusive: bool) -> Output:
        output = gate(images)
        if (images == 255).all((1, 2, 3)).any():
            raise ValueError
        return output

    with serving(fail_on_white) as served, ThreadPoolExecutor(4) as pool:
        fronts = [served.connect(description(tiny)) for _ in range(4)]
        calls = [pool.submit(fronts[0], noise(1))]
        assert gate.entered.wait(30)
        white = np.full((3, 32, 32, 3), 255, np.uint8)
        calls += [pool.submit(front, white if i == 1 else noise(3, i)) for i, front in enumerate(fronts[1:])]
        time.sleep(0.2)
        gate.opened.set()
        with pytest.raises(RuntimeError, match="inference failed for 3 images"):
            calls[2].result(30)
        for i in (0, 2):
            assert np.array_equal(calls[i + 1].result(30).probabilities, mean_of_pixels(noise(3, i)).probabilities)
        assert served.server.failure is None


@pytest.mark.parametrize("error", [DeviceLostError("gone"), None])
def test_lost_device_fails_the_server(tiny: Weights, error: DeviceLostError | None) -> None:
    """The engine process exits then, and the front end's call ends with it; here only the connection is closed."""

    def run(images: Images, exclusive: bool) -> Output:
        raise error or ValueError

    def verify() -> None:
        raise ValueError("the references differ")

    with serving(run, verify=verify) as served, ThreadPoolExecutor(1) as pool:
        ours, theirs = socket.socketpair()
        with ours, theirs:
            channels = channel.offer(ours, description(tiny))
            served.server.add(channels, served.model)
            remote = RemoteEngine(theirs)
        served.opened.append(remote)
        if error is None:
            with pytest.raises(RuntimeError):
                remote(noise(1))
            assert served.server.alive
        call = pool.submit(remote.verify if error is None else remote, *([] if error is None else [noise(1)]))
        deadline = time.monotonic() + 30
        while served.server.failure is None:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        for each in channels:
            each.connection.shutdown(socket.SHUT_RDWR)
        with pytest.raises(DeviceLostError, match="The engine process exited"):
            call.result(30)


def test_front_end_that_exits_leaves_the_others(tiny: Weights) -> None:
    gate = Gate()
    with serving(gate) as served, ThreadPoolExecutor(2) as pool:
        ours, theirs = socket.socketpair()
        served.server.add(channel.offer(ours, description(tiny)), served.model)
        _, dying = channel.accept(theirs)
        survivor = served.connect(description(tiny))
        dying[0].connection.sendall(channel.CALL.pack(channel.Operation.RUN, 4))
        assert gate.entered.wait(30)
        for each in dying:
            each.connection.close()  # as the kernel does when the process is killed
        call = pool.submit(survivor, noise(2))
        gate.opened.set()
        assert np.array_equal(call.result(30).probabilities, mean_of_pixels(noise(2)).probabilities)
        assert served.server.alive
        ours.close()
        theirs.close()


def test_engine_process_that_exits_before_the_offer_is_reported() -> None:
    ours, theirs = socket.socketpair()
    ours.close()
    with theirs, pytest.raises(DeviceLostError, match="The engine process exited"):
        RemoteEngine(theirs)


def test_reason_in_place_of_an_offer_is_reported() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        channel.describe(ours, OSError(12, "Cannot allocate memory"))
        with pytest.raises(WeightsError, match="Cannot allocate memory"):
            RemoteEngine(theirs)


def test_calls_of_two_models_share_no_batch(tiny: Weights) -> None:
    gate = Gate()

    def zeros(images: Images, exclusive: bool) -> Output:
        gate.batches.append(-len(images))
        return Output(np.zeros((len(images), CLASSES), np.float32), np.zeros(len(images), np.uint8))

    with serving(gate) as served, ThreadPoolExecutor(4) as pool:
        other = EngineModel(zeros, lambda: None)
        former, new = served.connect(description(tiny)), served.connect(description(tiny, 3), other)
        calls = [pool.submit(former, noise(1))]
        assert gate.entered.wait(30)
        calls += [pool.submit(new, noise(2)), pool.submit(new, noise(3)), pool.submit(former, noise(4))]
        time.sleep(0.2)
        gate.opened.set()
        outputs = [call.result(30) for call in calls]
    assert [output.probabilities.any() for output in outputs] == [True, False, False, True]
    assert sum(gate.batches) == 1 - 5 + 4


def test_channels_are_closed_with_the_last_reference(tiny: Weights) -> None:
    closed: SimpleQueue[EngineModel] = SimpleQueue()
    with serving(on_close=closed.put) as served:
        remote = served.connect(description(tiny))
        remote(noise(3))
        served.opened.clear()
        assert closed.empty()
        del remote
        assert [closed.get(timeout=30) for _ in range(2)] == [served.model] * 2


@pytest.mark.parametrize("streams", [1, 2])
def test_calls_are_answered_while_models_change(tiny: Weights, streams: int) -> None:
    closed: SimpleQueue[EngineModel] = SimpleQueue()
    stop = threading.Event()

    def constant(value: int) -> EngineModel:
        def run(images: Images, exclusive: bool) -> Output:
            return Output(np.full((len(images), CLASSES), value, np.float32), np.zeros(len(images), np.uint8))

        return EngineModel(run, lambda: None)

    with serving(streams=streams, on_close=closed.put) as served, ThreadPoolExecutor(4) as pool:
        current = [(0, served.connect(description(tiny), constant(0)))]

        def call(size: int) -> int:
            count = 0
            while not stop.is_set():
                value, remote = current[0]
                assert (remote(noise(size)).probabilities == value).all()
                count += 1
            return count

        callers = [pool.submit(call, size) for size in (1, 3, MAX_BATCH - 1, MAX_BATCH)]
        try:
            for value in range(1, 30):
                current[0] = value, served.connect(description(tiny), constant(value))
                served.opened.clear()
                time.sleep(0.01)
        finally:
            stop.set()
        assert all(caller.result(30) for caller in callers)
        assert [closed.get(timeout=30) for _ in range(2 * 29)]
        assert closed.empty()


def test_batches_are_observed_once_each(tiny: Weights) -> None:
    observed: list[tuple[int, float]] = []
    with serving(on_batch=lambda images, seconds: observed.append((images, seconds))) as served:
        remote = served.connect(description(tiny))
        remote(noise(3))
        remote.verify()
        remote(noise(5))
        deadline = time.monotonic() + 30
        while len(observed) < 2:  # observed after the reply
            assert time.monotonic() < deadline
            time.sleep(0.01)
    assert [images for images, _ in observed] == [3, 5]
    assert all(0 <= seconds < 30 for _, seconds in observed)


def test_shared_memory_has_no_name(tiny: Weights) -> None:
    before = named_shared_memory()
    with serving() as served:
        remote = served.connect(description(tiny))
        remote(noise(1))
        assert named_shared_memory() == before
