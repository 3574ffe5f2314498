"""`python -m app`: the service, or one of its commands. A wrong value is one line and exit code 2."""

import logging
import os
import signal
import sys
import tempfile
from contextlib import suppress
from functools import partial

import uvicorn

from app import classify, cli, settings
from app.api.http_protocol import Protocol
from app.application import create_app
from app.errors import SettingsError
from app.telemetry import logs, metrics

logger = logging.getLogger(__name__)

BACKLOG = 4096  # connections that wait to be accepted; one that finds no room tries again after 1, 3 and 7 s


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["classify"]:
        sys.exit(classify.run(argv[1:]))
    try:
        config, warnings = cli.parse(argv)
    except SettingsError as error:
        sys.exit(_complain(error))
    raise_descriptor_limit()
    server = uvicorn.Config(
        partial(create_app, config),  # pickled for every worker process
        factory=True,
        host=config.host,
        port=config.port,
        workers=config.workers,
        root_path=config.root_path,
        forwarded_allow_ips=list(config.trusted_proxies),
        ssl_certfile=config.tls_cert,
        ssl_keyfile=config.tls_key,
        log_config=logs.config(config.log_level, config.log_format),
        access_log=False,
        backlog=BACKLOG,
        server_header=False,
        http=Protocol,
        lifespan="on",
        timeout_keep_alive=config.keep_alive_s,  # type: ignore[arg-type]  # passed to loop.call_later
    )
    for warning in warnings + settings.warnings(os.environ):
        logger.warning(warning)
    sys.exit(_serve(server))


def _serve(config: uvicorn.Config) -> int:
    """0 after a clean stop, 2 where the service could not start; the log says why."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # uvicorn raises it again once it has stopped
    try:
        if config.workers == 1:
            server = uvicorn.Server(config)
            server.run()
            return 0 if server.started else 2
        supervisor = uvicorn.supervisors.Multiprocess(config, sockets=[config.bind_socket()])
        with tempfile.TemporaryDirectory(prefix="thirtytwo-metrics-") as folder:
            os.environ[metrics.FOLDER] = folder
            supervisor.run()
        return 2 if any(process.exitcode == uvicorn.config.STARTUP_FAILURE for process in supervisor.processes) else 0
    except SystemExit as stop:  # uvicorn's way to say that the port or the start-up failed
        return 2 if stop.code else 0
    except OSError as error:  # a broken certificate, or no place for what several workers count
        return _complain(error)
    except KeyboardInterrupt:
        return 0


def raise_descriptor_limit() -> None:
    """Up to what the system lets us: each connection takes one, and the usual soft limit is a thousand."""
    with suppress(ImportError):  # Windows has no such limit
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _complain(error: Exception) -> int:
    print(f"error: {error}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    main()
