"""uvicorn's supervisor of worker processes, which restarts a failed worker with back-off while the others serve.

The workers are front ends without an engine. They share the engine process; when it exits, all are started again.
"""

import signal
import socket
import time
from contextlib import suppress
from types import FrameType

import uvicorn
from uvicorn.config import STARTUP_FAILURE
from uvicorn.supervisors.multiprocess import Multiprocess

from app.process.server import GRACE_S
from app.process.signals import ReceivedSignals
from app.process.worker import EngineWorker, FrontEnd, Worker
from app.settings import Settings
from app.sources import LoadEngine, load_engine
from app.telemetry.log_stream import EXIT_S

ENGINE_EXIT_S = 2.0  # from the exit of the last front end to the engine process's


class Supervisor(Multiprocess):
    """`failed` is True once every worker has failed to start; no failed start is repeated until one has succeeded."""

    processes: list[FrontEnd]  # type: ignore[assignment]  # list is invariant; all of them are front ends

    def __init__(
        self,
        config: uvicorn.Config,
        sockets: list[socket.socket],
        settings: Settings,
        load_engine: LoadEngine = load_engine,
    ) -> None:
        super().__init__(config, sockets)
        self.failed = False
        self._settings, self._load_engine = settings, load_engine
        self._engines = 0
        self._served = False
        self._signals = ReceivedSignals()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._stop)

    def init_processes(self) -> None:
        self._engine = self._start_engine()
        self.processes = []
        while len(self.processes) < self.processes_num and not self.should_exit.is_set():
            self.processes.append(self._start())

    def keep_subprocess_alive(self) -> None:
        self._keep_engine_alive()
        for index, worker in enumerate(self.processes):
            if self.should_exit.is_set():
                return
            if worker.process.is_alive():
                worker.check()
                worker.reload()
                self._served = self._served or worker.ready_since is not None
            elif self._has_former_engine(worker):
                if self._engine.process.is_alive():
                    self.processes[index] = self._start()
            elif worker.restart_at is None:
                worker.schedule_restart()
            elif time.monotonic() >= worker.restart_at and (self._served or worker.exitcode != STARTUP_FAILURE):
                self.processes[index] = self._start(worker.failures)
        if self._has_failed():
            self.failed = True
            self.should_exit.set()

    def join_all(self) -> None:
        limit_s = float(self.config.timeout_graceful_shutdown or 0) + GRACE_S + EXIT_S
        deadline = time.monotonic() + limit_s
        for worker in self.processes:
            self._join(worker, deadline)
        if self._engine.process.is_alive():
            self._engine.process.terminate()
        self._join(self._engine, time.monotonic() + ENGINE_EXIT_S)

    def handle_hup(self) -> None:
        for worker in self.processes:  # in the next round
            worker.reload_pending = True

    def handle_ttin(self) -> None:
        self.processes_num += 1
        self.processes.append(self._start())

    def _keep_engine_alive(self) -> None:
        engine = self._engine
        if engine.process.is_alive():
            engine.check()
        elif engine.restart_at is None:
            engine.schedule_restart()
            for worker in self.processes:
                if worker.process.is_alive():
                    worker.process.terminate()
        elif time.monotonic() >= engine.restart_at and (self._served or engine.exitcode != STARTUP_FAILURE):
            self._engine = self._start_engine(engine.failures)

    def _has_former_engine(self, worker: FrontEnd) -> bool:
        """Whether the worker belongs to an engine process that has exited: its own exit is no failure."""
        return worker.engine < self._engines or not self._engine.process.is_alive()

    def _start(self, failures: int = 0) -> FrontEnd:
        engine_end, worker_end = socket.socketpair()
        with engine_end, worker_end:
            with suppress(OSError):  # the engine process has exited: the worker will, too
                socket.send_fds(self._control, [b"\0"], [engine_end.fileno()])
            worker = FrontEnd(self.config, self.sockets, worker_end, self._engines, failures)
            worker.start()
        return worker

    def _start_engine(self, failures: int = 0) -> EngineWorker:
        self._control, engine_end = socket.socketpair()
        with engine_end:
            engine = EngineWorker(self.config, self._settings, self._load_engine, engine_end, failures)
            engine.start()
        self._engines += 1
        return engine

    def _join(self, worker: Worker, deadline: float) -> None:
        while worker.process.is_alive() and time.monotonic() < deadline and len(self._signals) < 2:
            worker.process.join(0.1)
        if worker.process.is_alive():
            worker.process.kill()
        worker.process.join()

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self._signals.add(number)
        self.should_exit.set()

    def _has_failed(self) -> bool:
        if self._served:
            return False
        if not self._engine.process.is_alive():
            return self._engine.exitcode == STARTUP_FAILURE
        return all(worker.exitcode == STARTUP_FAILURE for worker in self.processes)
