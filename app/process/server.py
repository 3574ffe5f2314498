"""uvicorn's server with a drain before the listener closes, a limit on the shutdown, and a reload on SIGHUP."""

import asyncio
import logging
import multiprocessing
import os
import signal
import socket
import ssl
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType

import uvicorn

from app.http.backlog import serve_backlog
from app.process.lifecycle import Lifecycle, Phase, exit_past_threads
from app.process.signals import ReceivedSignals
from app.telemetry.log_stream import exit_process

GRACE_S = 1.0  # from the shutdown timeout, or from a repeated signal, to the exit
PERIOD_S = 0.05

logger = logging.getLogger(__name__)


class Server(uvicorn.Server):
    """The first SIGINT or SIGTERM refuses new work, and closes the listener once accepted requests are answered.

    The process exits at most 2 seconds after `timeout_graceful_shutdown`, whatever still runs.
    """

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self._timeout_s = float(config.timeout_graceful_shutdown or 0)
        self._parent = multiprocessing.parent_process()
        self._signals = ReceivedSignals()
        self._exit_at = float("inf")
        self._drain_task: asyncio.Task[None] | None = None
        self._reload_task: asyncio.Task[None] | None = None
        self._had_terminal = _has_terminal()

    @property
    def lifecycle(self) -> Lifecycle | None:
        service = self.lifespan.state.get("service") if self.started else None
        return service.lifecycle if service else None

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        super().run(sockets)
        if time.monotonic() > self._exit_at - GRACE_S:  # the interpreter's end takes time, in which no thread runs
            exit_process(0)
        exit_past_threads(0)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._loop = asyncio.get_running_loop()
        if threading.current_thread() is not threading.main_thread():
            return
        if hasattr(signal, "SIGHUP"):
            self._loop.add_signal_handler(signal.SIGHUP, self._hang_up)
        if self._parent is not None:
            self._loop.add_reader(self._parent.sentinel, self._stop_without_parent, self._parent.sentinel)
        for sock in sockets or []:
            logger.info("serving on %s", _url(sock, self.config.is_ssl))

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Called in the main thread between any two of its instructions."""
        if not self._signals.add(sig):
            return
        now = time.monotonic()
        if not self.started:
            exit_process(0)  # nothing has been accepted
        if len(self._signals) == 1:
            self._exit_at = now + self._timeout_s + GRACE_S
            threading.Thread(target=self._exit_in_time, name="exit", daemon=True).start()
            self._loop.call_soon_threadsafe(self._begin_drain)
        elif self._is_forced():
            self._exit_at = min(self._exit_at, now + GRACE_S)
            self.should_exit = self.force_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        if self._signals:
            left_s = self._exit_at - GRACE_S - time.monotonic()
            # asyncio.wait_for, which uvicorn passes it to, has no need of an int
            self.config.timeout_graceful_shutdown = max(GRACE_S / 2, left_s)  # type: ignore[assignment]
        await serve_backlog(self)
        await super().shutdown(sockets)
        if self.force_exit:  # uvicorn leaves it out: the lifespan's task would be cancelled, with a traceback
            await self.lifespan.shutdown()

    def _begin_drain(self) -> None:
        self._drain_task = self._loop.create_task(self._drain())

    async def _drain(self) -> None:
        if self.lifecycle is not None:
            await self.lifecycle.drain(self._timeout_s)
        self.should_exit = True

    def _is_forced(self) -> bool:
        """A worker gets SIGTERM from its supervisor, and another where a service manager signals all processes."""
        return self._parent is None or self._signals.count(signal.SIGINT) > 1

    def _exit_in_time(self) -> None:
        """Runs in a thread, since the event loop may be blocked, or wait for a thread that is."""
        pause = threading.Event()  # not time.sleep, which fails where a tool fakes the system clock
        while time.monotonic() < self._exit_at:
            pause.wait(PERIOD_S)
        lifecycle = self.lifecycle
        logger.warning(
            "shutdown timeout: exiting with %d requests and %d connections open",
            lifecycle.in_flight if lifecycle else 0,
            len(self.server_state.connections),
        )
        exit_process(1 if lifecycle and lifecycle.phase is Phase.FAILED else 0)

    def _stop_without_parent(self, sentinel: int) -> None:
        self._loop.remove_reader(sentinel)
        logger.warning("parent process exited; shutting down")
        signal.raise_signal(signal.SIGTERM)

    def _hang_up(self) -> None:
        """A reload, except where SIGHUP came because the terminal has closed."""
        if self._had_terminal and not _has_terminal():
            signal.raise_signal(signal.SIGTERM)
        else:
            self._reload_task = self._loop.create_task(self._reload())

    async def _reload(self) -> None:
        logger.info("SIGHUP: reloading certificate, API keys and weights")
        if self.config.ssl is not None and self.config.ssl_certfile and self.config.ssl_keyfile:
            try:
                load_certificate(self.config.ssl, Path(self.config.ssl_certfile), Path(self.config.ssl_keyfile))
            except OSError as error:
                logger.error("the certificate stays as it was: %s", error)
        if self.lifecycle is not None:
            await self.lifecycle.reload()


def load_certificate(context: ssl.SSLContext, certificate: Path, key: Path) -> None:
    """For all later connections. Raises OSError, ssl.SSLError included, and leaves the context as it was."""
    trial = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)  # a pair that does not match would leave a context without its key
    for each in (trial, context):
        each.load_cert_chain(certificate, key, password=lambda: "")  # instead of a prompt on the terminal


def listen(host: str, port: int) -> list[socket.socket]:
    """A bound socket per address of the host; `::` accepts IPv4, too. Raises OSError."""
    addresses = dict.fromkeys(
        (family, address) for family, *_, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    )
    sockets: list[socket.socket] = []
    for family, address in addresses:
        try:
            sockets.append(_bind(family, (address[0], port, *address[2:])))
        except OSError:
            if not sockets or family != socket.AF_INET6:  # a name's IPv6 address on a machine without IPv6
                raise
        port = sockets[0].getsockname()[1]
    return sockets


def _bind(family: int, address: Sequence[str | int]) -> socket.socket:
    sock = socket.socket(family)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, address[0] != "::")
        sock.bind(tuple(address))
    except OSError:
        sock.close()
        raise
    sock.set_inheritable(True)
    return sock


def _url(sock: socket.socket, tls: bool) -> str:
    host, port = sock.getsockname()[:2]
    return f"{'https' if tls else 'http'}://{f'[{host}]' if ':' in host else host}:{port}"


def _has_terminal() -> bool:
    """Whether this process has a controlling terminal."""
    with suppress(OSError):
        os.close(os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY | os.O_NONBLOCK))
        return True
    return False
