"""`python -m app healthcheck`: whether the service on this machine is ready.

It runs every few seconds beside the service, so it imports neither pydantic nor numpy: 0.1 s instead of 0.6 s of CPU.
"""

import argparse
import os
import ssl
import sys
from http.client import HTTPConnection, HTTPException, HTTPSConnection

TIMEOUT_S = 4.0
LOOPBACK = {"0.0.0.0": "127.0.0.1", "": "127.0.0.1", "::": "::1"}  # noqa: S104 (compared, not bound)


def run(argv: list[str]) -> int:
    """The exit status: 0 if `/readyz` answers 200, 1 otherwise with one line that says why."""
    arguments = parser().parse_args(argv)
    try:
        status = ready_status(arguments.host, arguments.port, bool(arguments.tls_cert))
    except (OSError, HTTPException) as error:
        print(f"not ready: {error}", file=sys.stderr)
        return 1
    if status != 200:
        print(f"not ready: /readyz answers {status}", file=sys.stderr)
    return int(status != 200)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m app healthcheck",
        description="Exits with 0 if the service with the same settings on this machine is ready.",
    )
    for name, default in (("HOST", "127.0.0.1"), ("PORT", "8000"), ("TLS_CERT", "")):
        variable = f"THIRTYTWO_{name}"
        made.add_argument(
            f"--{name.lower().replace('_', '-')}",
            type=int if name == "PORT" else str,
            default=os.environ.get(variable) or default,
            help=f"as of the service [{variable}]",
        )
    return made


def ready_status(host: str, port: int, tls: bool) -> int:
    host = host.strip().removeprefix("[").removesuffix("]")
    host = LOOPBACK.get(host, host)
    if tls:
        context = ssl.create_default_context()
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE  # the certificate is our own, for a name that is not this address
        connection: HTTPConnection = HTTPSConnection(host, port, timeout=TIMEOUT_S, context=context)
    else:
        connection = HTTPConnection(host, port, timeout=TIMEOUT_S)
    connection.request("GET", "/readyz")
    return connection.getresponse().status
