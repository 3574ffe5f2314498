"""The service as one process, or as a supervisor, front ends and an engine process."""

import logging
import os
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from ipaddress import IPv4Network, ip_network
from pathlib import Path
from socket import socket
from ssl import PROTOCOL_TLS_SERVER, SSLContext

import uvicorn

from app import defaults, settings
from app.application import create_app
from app.commands import cli
from app.engines.hardware import available_cpus
from app.errors import SettingsError
from app.http.http_protocol import Protocol
from app.process.server import Server, listen, load_certificate
from app.process.supervisor import Supervisor
from app.settings import PREFIX, Settings
from app.telemetry import logs, metrics

MAX_DESCRIPTORS = 10_240  # where the system has no hard limit
BACKLOG = 4096  # connections that wait to be accepted; one that finds no room tries again after 1, 3 and 7 s

logger = logging.getLogger(__name__)


def run(argv: list[str]) -> int:
    """The exit status: 0 after a graceful shutdown, 2 where the model cannot be served. Raises SettingsError."""
    config, warnings = cli.parse(argv)
    config = config.model_copy(update={"workers": choose_workers(config, available_cpus())})
    check_certificate(config.tls_cert, config.tls_key)
    sockets = bind(config)
    raise_descriptor_limit()
    server = server_config(config)
    for warning in warnings + settings.warnings(os.environ):
        logger.warning(warning)
    return _serve(server, sockets, config)


def choose_workers(config: Settings, cpus: int, temporary_directory: Callable[[], str] = tempfile.gettempdir) -> int:
    """The setting, or the device's default; one where several cannot be. Raises SettingsError if the setting cannot."""
    workers = defaults.workers(config.workers, config.device, cpus)
    if workers > 1 and config.shadow_weights:
        if config.workers:
            raise SettingsError(f"{PREFIX}SHADOW_WEIGHTS needs one HTTP process; {PREFIX}WORKERS is {workers}.")
        logger.warning("one HTTP process, since SHADOW_WEIGHTS needs that")
        return 1
    if workers == 1 or config.workers:
        return workers
    try:
        temporary_directory()
    except FileNotFoundError:
        logger.warning("one HTTP process, since several need a writable temporary directory")
        return 1
    return workers


def server_config(config: Settings) -> uvicorn.Config:
    return uvicorn.Config(
        partial(create_app, config),  # pickled for every worker process
        factory=True,
        workers=config.workers,
        forwarded_allow_ips=with_mapped(config.trusted_proxies),
        ssl_certfile=config.tls_cert,
        ssl_keyfile=config.tls_key,
        log_config=logs.config(config.log_level, config.log_format),
        access_log=False,
        backlog=BACKLOG,
        server_header=False,
        http=Protocol,
        lifespan="on",
        ws="none",
        # both are typed as int; `Protocol` and `Server` read them, and a fraction of a second is valid
        timeout_keep_alive=config.keep_alive_s,  # type: ignore[arg-type]
        timeout_graceful_shutdown=config.shutdown_timeout_s,  # type: ignore[arg-type]
    )


def bind(config: Settings) -> list[socket]:
    try:
        return listen(config.host, config.port)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise SettingsError(f"{PREFIX}HOST, {PREFIX}PORT: {config.host} port {config.port}: {reason}") from error


def check_certificate(certificate: Path | None, key: Path | None) -> None:
    if certificate is None or key is None:
        return
    try:
        load_certificate(SSLContext(PROTOCOL_TLS_SERVER), certificate, key)
    except OSError as error:
        raise SettingsError(
            f"{PREFIX}TLS_CERT, {PREFIX}TLS_KEY: not a certificate chain and its unencrypted key: {error}"
        ) from error


def with_mapped(proxies: Sequence[str]) -> list[str]:
    """Each IPv4 address also as the IPv6 address that it has on a socket for both."""
    networks = [ip_network(proxy) for proxy in proxies if proxy != "*"]
    mapped = [
        f"::ffff:{network.network_address}/{96 + network.prefixlen}"
        for network in networks
        if isinstance(network, IPv4Network)
    ]
    return ["*"] if "*" in proxies else [*proxies, *mapped]


def _serve(config: uvicorn.Config, sockets: list[socket], settings: Settings) -> int:
    try:
        if config.workers == 1:
            server = Server(config)
            server.run(sockets)
            return 0 if server.started else 2
        supervisor = Supervisor(config, sockets, settings)
        with tempfile.TemporaryDirectory(prefix="thirtytwo-metrics-") as folder:
            os.environ[metrics.FOLDER] = folder
            supervisor.run()
        return 2 if supervisor.failed else 0
    except SystemExit as stop:  # uvicorn's way to report that the start-up failed
        return 2 if stop.code else 0
    except OSError as error:
        raise SettingsError(f"no directory for the workers' metrics: {error}") from error


def raise_descriptor_limit() -> None:
    """To the hard limit: each connection needs one, and the usual soft limit is 1,024."""
    with suppress(ImportError, OSError, ValueError):  # Windows has no such limit; a system may refuse a value
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        limit = max(soft, MAX_DESCRIPTORS) if hard == resource.RLIM_INFINITY else hard  # macOS refuses infinity
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
