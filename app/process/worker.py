"""The processes below the supervisor: front ends, and the engine process that they share."""

import copy
import logging
import os
import signal
import socket
import threading
import time
from functools import partial
from typing import Any

import uvicorn
from uvicorn.supervisors.multiprocess import Process

from app.process import engine_process
from app.process.server import Server
from app.settings import Settings
from app.sources import LoadEngine

PING_S = 0.5
PINGS = 20  # unanswered in succession, before a worker that once answered is killed
START_S = 300.0  # for a worker to answer for the first time
BACKOFF_S = 1.0, 30.0  # first and longest wait before a worker that failed to start is started again
STEADY_S = 60.0  # of service, after which earlier failures do not count

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

    def target(self, sockets: list[socket.socket] | None = None) -> None:
        self._server = Server(self.config)  # uvicorn's thread for pings would make another one at the same time
        super().target(sockets)

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

    def schedule_restart(self) -> None:
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
