"""`python -m app`: flags over environment over defaults, then uvicorn. A wrong value is one line and exit code 2."""

import argparse
import os
import signal
import sys
import tempfile
from contextlib import suppress

import uvicorn

from app import classify, settings
from app.api.http_protocol import Protocol
from app.errors import SettingsError
from app.settings import PREFIX, Settings
from app.telemetry import logs, metrics

BACKLOG = 4096  # connections that wait to be accepted; one that finds no room tries again after 1, 3 and 7 s


def parse(argv: list[str] | None = None) -> dict[str, str]:
    """The flags that were given, as environment variables. Every setting is a flag, made from the one table."""
    parser = argparse.ArgumentParser(
        prog="python -m app",
        description="Serves a weights file. Every flag has an environment variable; the flag wins. "
        "`python -m app classify FILE...` answers without a server.",
    )
    for name, field in Settings.model_fields.items():
        default = field.get_default(call_default_factory=True)
        shown = default if isinstance(default, (int, float, str)) and default != "" else "none"
        text = f"{field.description} [{PREFIX}{name.upper()}" + (f"={shown}]" if name != "weights" else "]")
        parser.add_argument(f"--{name.replace('_', '-')}", metavar="X", help=text.replace("%", "%%"))
    given = vars(parser.parse_args(argv))
    return {PREFIX + name.upper(): value for name, value in given.items() if value is not None}


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["classify"]:
        sys.exit(classify.run(argv[1:]))
    os.environ.update(parse(argv))  # so that every worker process reads the same
    try:
        config = settings.load()
    except SettingsError as error:
        sys.exit(_complain(error))
    raise_descriptor_limit()
    server = uvicorn.Config(
        "app.application:create_app",
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
    )
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
