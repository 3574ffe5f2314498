"""`python -m app`: the service, or one of its commands. Imports are deferred, since signals must be handled at once."""

import os
import signal
import sys

from app.errors import SettingsError


def main() -> None:
    open_standard_streams()
    try:
        sys.exit(_run(sys.argv[1:]))
    except SettingsError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def _run(argv: list[str]) -> int:
    if argv[:1] == ["classify"]:
        from app.commands import classify
        from app.process import lifecycle

        status = classify.run(argv[1:])
        lifecycle.exit_past_threads(status)
        return status
    if argv[:1] == ["healthcheck"]:
        from app.commands import healthcheck

        return healthcheck.run(argv[1:])
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))  # until the server handles it; nothing is in flight yet
    if hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # until the server reloads on it
    from app.commands import serve

    return serve.run(argv)


def open_standard_streams() -> None:
    """A closed descriptor 0, 1 or 2 becomes /dev/null; else a socket gets the number, and log lines go to a client."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number
    sys.stdout = sys.stdout or open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = sys.stderr or open(2, "w", closefd=False)  # noqa: SIM115


if __name__ == "__main__":
    main()
