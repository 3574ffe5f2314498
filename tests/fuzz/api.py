"""Schemathesis on the service's OpenAPI schema: `python -m tests.fuzz.api --max-examples 1000`; flags are its own."""

import subprocess
import sys

from benchmarks.server_process import running, service

PORT = 18096
CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
    "unsupported_method",
    "allow_header_conformance",
)


def fuzz(url: str, *flags: str) -> subprocess.CompletedProcess[str]:
    """Requests to every operation; a 5xx or an undocumented response fails the run."""
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{url}/openapi.json", "--checks", ",".join(CHECKS)]
    return subprocess.run([*command, *flags], capture_output=True, text=True, check=False)


def main() -> None:
    with running(service(PORT), PORT):
        ended = fuzz(f"http://127.0.0.1:{PORT}", *sys.argv[1:])
    print(ended.stdout, ended.stderr)  # noqa: T201
    sys.exit(ended.returncode)


if __name__ == "__main__":
    main()
