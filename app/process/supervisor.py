"""uvicorn's supervisor of worker processes, which restarts a failed worker with back-off while the others serve."""

import logging
import os
import signal
import socket
import time

import uvicorn
from uvicorn.config import STARTUP_FAILURE
from uvicorn.supervisors.multiprocess import Multiprocess, Process

from app.process.server import GRACE_S, Server
from app.telemetry.log_stream import EXIT_S

PING_S = 0.5
PINGS = 20  # unanswered in succession, before a worker that once answered is killed
START_S = 300.0  # for a worker to answer for the first time
BACKOFF_S = 1.0, 30.0  # first and longest wait before a worker that failed to start is started again
STEADY_S = 60.0  # of service, after which earlier failures do not count

logger = logging.getLogger(__name__)


class Worker(Process):
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
            logger.error("worker %d does not answer; killing it", self.pid)
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
        logger.error("worker %d exited with status %s; next start in %g s", self.pid, self.exitcode, wait_s)


class Supervisor(Multiprocess):
    """`failed` is True once every worker has failed to start; no failed start is repeated until one has succeeded."""

    processes: list[Worker]  # type: ignore[assignment]

    def __init__(self, config: uvicorn.Config, sockets: list[socket.socket]) -> None:
        super().__init__(config, sockets)
        self.failed = False
        self._served = False
        self._signals = 0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: self._stop())

    def init_processes(self) -> None:
        self.processes = [self._start() for _ in range(self.processes_num)]

    def keep_subprocess_alive(self) -> None:
        for index, worker in enumerate(self.processes):
            if self.should_exit.is_set():
                return
            if worker.process.is_alive():
                worker.check()
                worker.reload()
                self._served = self._served or worker.ready_since is not None
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
            while worker.process.is_alive() and time.monotonic() < deadline and self._signals < 2:
                worker.process.join(0.1)
            if worker.process.is_alive():
                worker.process.kill()
            worker.process.join()

    def handle_hup(self) -> None:
        for worker in self.processes:  # in the next round
            worker.reload_pending = True

    def handle_ttin(self) -> None:
        self.processes_num += 1
        self.processes.append(self._start())

    def _start(self, failures: int = 0) -> Worker:
        worker = Worker(self.config, self.sockets, failures)
        worker.start()
        return worker

    def _stop(self) -> None:
        self._signals += 1
        self.should_exit.set()

    def _has_failed(self) -> bool:
        return not self._served and all(worker.exitcode == STARTUP_FAILURE for worker in self.processes)
