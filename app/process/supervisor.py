"""uvicorn's supervisor of worker processes, which restarts a failed worker with back-off while the others serve.

The workers are front ends without an engine. They share the engine process; when it exits, all are started again.
"""

import copy
import logging
import os
import signal
import socket
import threading
import time
from contextlib import suppress
from functools import partial
from typing import Any

import uvicorn
from uvicorn.config import STARTUP_FAILURE
from uvicorn.supervisors.multiprocess import Multiprocess, Process

from app.lifespan import LoadEngine, load_engine
from app.process import engine_process
from app.process.server import GRACE_S, Server
from app.settings import Settings
from app.telemetry.log_stream import EXIT_S

PING_S = 0.5
PINGS = 20  # unanswered in succession, before a worker that once answered is killed
START_S = 300.0  # for a worker to answer for the first time
BACKOFF_S = 1.0, 30.0  # first and longest wait before a worker that failed to start is started again
STEADY_S = 60.0  # of service, after which earlier failures do not count
ENGINE_EXIT_S = 2.0  # from the exit of the last front end to the engine process's

logger = logging.getLogger(__name__)


class Worker(Process):
    title = "worker"

    def __init__(self, config: uvicorn.Config, sockets: list[socket.socket], failures: int = 0) -> None:
        super().__init__(config, sockets)
        self.failures = failures  # of this worker's predecessors in succession
        self.created = time.monotonic()
        self.ready_since: float | None = None
        self.restart_at: float | None = None  # set once the process has ended
        self.reload_pending = False
        self._answered = False
        self._unanswered = 0

    @property
    def server(self) -> Server:
        if self._server is None:
            self._server = Server(self.config)
        assert isinstance(self._server, Server)
        return self._server

    def check(self) -> None:
        """Pings the process, and kills it when it has stopped answering.

        Unanswered pings are counted, since after a pause of the machine any time limit has passed.
        """
        if self.is_ready(PING_S):
            self.ready_since = self.ready_since or time.monotonic()
            self._answered, self._unanswered = True, 0
        elif self.ping(PING_S):
            self._answered, self._unanswered = True, 0
        else:
            self._unanswered += 1
        silent = self._unanswered > PINGS if self._answered else time.monotonic() - self.created > START_S
        if silent:
            logger.error("%s %d does not answer; killing it", self.title, self.pid)
            self.process.kill()

    def reload(self) -> None:
        """Sends SIGHUP, but not before the worker handles it: by default it would end the process."""
        if self.reload_pending and self.ready_since is not None and self.pid is not None:
            os.kill(self.pid, signal.SIGHUP)
            self.reload_pending = False

    def bury(self) -> None:
        """Called once, after the process has ended: sets the time of the restart."""
        self.process.join()
        self.parent_conn.close()
        self.child_conn.close()
        now = time.monotonic()
        if self.ready_since is not None and now - self.ready_since > STEADY_S:
            self.failures = 0
        first, longest = BACKOFF_S
        wait_s = 0.0 if self.ready_since is not None and not self.failures else min(longest, first * 2**self.failures)
        self.failures += 1
        self.restart_at = now + wait_s
        logger.error("%s %d exited with status %s; next start in %g s", self.title, self.pid, self.exitcode, wait_s)


class FrontEnd(Worker):
    """A worker whose batches run in the engine process at the other end of `link`."""

    def __init__(
        self, config: uvicorn.Config, sockets: list[socket.socket], link: socket.socket, engine: int, failures: int
    ) -> None:
        super().__init__(config, sockets, failures)
        self.link = link
        self.engine = engine  # counts the engine processes so far

    def target(self, sockets: list[socket.socket] | None = None) -> None:
        create_app: Any = self.config.app
        self.config.app = partial(create_app, link=self.link)
        super().target(sockets)


class EngineWorker(Worker):
    title = "engine process"

    def __init__(
        self,
        config: uvicorn.Config,
        settings: Settings,
        load_engine: LoadEngine,
        control: socket.socket,
        failures: int = 0,
    ) -> None:
        config = copy.copy(config)  # for its log; the process serves no application
        config.app = ""
        super().__init__(config, [], failures)
        self._arguments = settings, load_engine, control
        self._ready = False

    def target(self, sockets: list[socket.socket] | None = None) -> None:
        threading.Thread(target=self.always_pong, daemon=True).start()
        engine_process.run(*self._arguments, self._set_ready)

    def pong(self) -> None:
        self.child_conn.recv()
        self.child_conn.send(self._ready)

    def _set_ready(self) -> None:
        self._ready = True


class Supervisor(Multiprocess):
    """`failed` is True once every worker has failed to start; no failed start is repeated until one has succeeded."""

    processes: list[FrontEnd]  # type: ignore[assignment]

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
        self._signals = 0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: self._stop())

    def init_processes(self) -> None:
        self._engine = self._start_engine()
        self.processes = [self._start() for _ in range(self.processes_num)]

    def keep_subprocess_alive(self) -> None:
        self._keep_engine_alive()
        for index, worker in enumerate(self.processes):
            if self.should_exit.is_set():
                return
            if worker.process.is_alive():
                worker.check()
                worker.reload()
                self._served = self._served or worker.ready_since is not None
            elif self._is_orphan(worker):
                if self._engine.process.is_alive():
                    self.processes[index] = self._start()
            elif worker.restart_at is None:
                worker.bury()
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
            engine.bury()
            for worker in self.processes:
                if worker.process.is_alive():
                    worker.process.terminate()
        elif time.monotonic() >= engine.restart_at and (self._served or engine.exitcode != STARTUP_FAILURE):
            self._engine = self._start_engine(engine.failures)

    def _is_orphan(self, worker: FrontEnd) -> bool:
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
        while worker.process.is_alive() and time.monotonic() < deadline and self._signals < 2:
            worker.process.join(0.1)
        if worker.process.is_alive():
            worker.process.kill()
        worker.process.join()

    def _stop(self) -> None:
        self._signals += 1
        self.should_exit.set()

    def _has_failed(self) -> bool:
        if self._served:
            return False
        if not self._engine.process.is_alive():
            return self._engine.exitcode == STARTUP_FAILURE
        return all(worker.exitcode == STARTUP_FAILURE for worker in self.processes)
