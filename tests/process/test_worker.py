"""A worker process and its answers to pings."""

import socket
import time
from typing import Any

import pytest
import uvicorn

from app.process.server import listen
from app.process.worker import FrontEnd
from tests.support.raw_http import echo
from tests.support.subprocesses import wait_until

pytestmark = pytest.mark.slow  # starts processes


class SlowConfig(uvicorn.Config):
    """Makes the construction of a server last, in which a ping may arrive."""

    @property
    def timeout_graceful_shutdown(self) -> int:
        time.sleep(0.3)
        return 1

    @timeout_graceful_shutdown.setter
    def timeout_graceful_shutdown(self, value: int | None) -> None:
        del value


def create_app(link: socket.socket) -> Any:
    return echo


def test_a_ping_during_the_start_gets_the_state_of_the_server_that_runs() -> None:
    config = SlowConfig(create_app, factory=True, lifespan="off", log_level="warning")
    here, there = socket.socketpair()
    sockets = listen("127.0.0.1", 0)
    worker = FrontEnd(config, sockets, there, 0, 0)
    worker.start()
    try:
        wait_until(lambda: worker.is_ready(0.5))
    finally:
        worker.process.terminate()
        worker.process.join(10)
        for each in (here, there, *sockets):
            each.close()
    assert worker.exitcode == 0
