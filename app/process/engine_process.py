"""The process with the engine that all front ends share: start, links to front ends, watchdog, metrics, exit."""

import asyncio
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any, NoReturn

from uvicorn.config import STARTUP_FAILURE

from app.engines import channel
from app.engines.channel import REQUEST, Description, Operation
from app.engines.server import EngineModel, EngineServer
from app.errors import ThirtytwoError
from app.lifespan import GIL_SWITCH_INTERVAL_S
from app.process.engine_models import CHANNELS, EngineModels
from app.process.lifecycle import Lifecycle, watch
from app.settings import Settings
from app.sources import FileSource, LoadEngine
from app.telemetry import capacity, device_memory, log_stream
from app.telemetry.capacity import EngineUsage
from app.telemetry.log_stream import exit_process
from app.telemetry.metrics import Metrics

SIZES_PER_OCTAVE = 4  # calls are not split over batches, so a batch may have any size
ANSWER_TIMEOUT_S = 60.0  # for a front end to read an answer on its link

logger = logging.getLogger(__name__)


def run(settings: Settings, load_engine: LoadEngine, control: socket.socket, on_ready: Callable[[], None]) -> NoReturn:
    """Serves the front ends whose links arrive on `control`, until SIGTERM and the exit of the last of them.

    The exit status is 0, 1 if the device or an inference thread fails, or STARTUP_FAILURE with one line.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: os._exit(0))  # until the loop handles it; no front end is served yet
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        models = EngineModels(FileSource(settings, load_engine, SIZES_PER_OCTAVE))
    except ThirtytwoError as error:
        logger.error("%s", error)
        exit_process(STARTUP_FAILURE)
    except Exception:
        logger.exception("the engine process cannot start")
        exit_process(STARTUP_FAILURE)
    sys.setswitchinterval(GIL_SWITCH_INTERVAL_S)
    asyncio.run(EngineProcess(settings, models, control).serve(on_ready))


class EngineProcess:
    def __init__(self, settings: Settings, models: EngineModels, control: socket.socket) -> None:
        self._models = models
        self._limit_s = settings.inference_timeout_s
        self._metrics = Metrics()
        log_stream.stderr().on_drop(self._metrics.log_lines_dropped.inc)
        self._usage = EngineUsage(models.current.cost)
        classifier = models.current.classifier  # later models split what is more than theirs
        self._server = EngineServer(
            max(classifier.batch_sizes), classifier.engine.streams, self._observe_batch, self._on_close
        )
        self._control = control
        self._links: set[socket.socket] = set()
        self._stopping = False
        self._stopped = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()

    async def serve(self, on_ready: Callable[[], None]) -> NoReturn:
        """Exits from within the loop, which would wait for a thread that is in a call of the driver."""
        self._loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            self._loop.add_signal_handler(number, self._stop)
        self._control.setblocking(False)
        self._loop.add_reader(self._control, self._receive_link)
        self._server.start()
        self._observe_memory()
        self._start(capacity.repeat(self._sample))
        watchdog = self._start(watch(self._server, Lifecycle(), self._limit_s))
        on_ready()
        await asyncio.wait({watchdog, self._start(self._wait_until_stopped())}, return_when=asyncio.FIRST_COMPLETED)
        exit_process(int(watchdog.done()))

    def _observe_memory(self) -> None:
        models = self._models  # the current one: a former one is not kept
        device = models.current.classifier.engine.device
        device_memory.start(
            lambda: models.current.classifier.engine.memory(), partial(self._metrics.observe_memory, device)
        )

    def _observe_batch(self, images: int, seconds: float) -> None:
        self._metrics.observe_batch(images, seconds)
        self._usage.observe_batch(images, seconds)

    def _sample(self) -> None:
        self._metrics.observe_engine(*self._usage.sample(self._models.current.cost))

    def _on_close(self, model: EngineModel) -> None:
        """Called in a thread of the server."""
        self._loop.call_soon_threadsafe(self._models.close_channels, model)

    def _start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _wait_until_stopped(self) -> None:
        await self._stopped.wait()

    def _stop(self) -> None:
        """Front ends drain first: the process exits with the last of them."""
        self._stopping = True
        if not self._links:
            self._stopped.set()

    def _receive_link(self) -> None:
        try:
            _, descriptors, *_ = socket.recv_fds(self._control, 1, 1)
        except BlockingIOError:
            return
        if not descriptors:  # the supervisor has exited
            self._loop.remove_reader(self._control)
            self._stop()
            return
        link = socket.socket(fileno=descriptors[0])
        self._links.add(link)
        self._start(self._serve_link(link))

    async def _serve_link(self, link: socket.socket) -> None:
        """Until the front end exits."""
        try:
            link.setblocking(False)
            while request := await self._loop.sock_recv(link, REQUEST.size):
                link.settimeout(ANSWER_TIMEOUT_S)
                await self._answer(link, Operation(*REQUEST.unpack(request)))
                link.setblocking(False)
        except OSError as error:
            logger.warning("a front end exited before it got an answer: %s", error)
        finally:
            link.close()
            self._links.discard(link)
            if self._stopping:
                self._stop()

    async def _answer(self, link: socket.socket, operation: Operation) -> None:
        if operation is Operation.LOAD:
            await asyncio.to_thread(channel.describe, link, await self._load())
            return
        model = self._models.open_channels()
        try:
            channels = await asyncio.to_thread(channel.offer, link, model.description)
        except OSError as error:  # too few descriptors, too little memory, or the front end has exited
            self._models.close_channels(model.engine_model, CHANNELS)
            await asyncio.to_thread(channel.describe, link, error)
            return
        self._server.add(channels, model.engine_model)

    async def _load(self) -> Description | Exception:
        """The file's model, or the reason why it cannot serve: the front end logs it."""
        try:
            return (await self._models.load()).description
        except ThirtytwoError as error:
            return error
        except Exception as error:
            logger.exception("the weights file cannot be served")
            return error
