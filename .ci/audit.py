"""Looks up the pinned versions in PyPI's advisories. Exits with 1 for a vulnerability, with 2 without a database."""

import json
import subprocess
import sys


def main() -> int:
    command = ["-m", "pip_audit", "-r", "constraints.txt", "--no-deps", "--disable-pip", "--format", "json"]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False)  # noqa: S603
    try:
        versions = json.loads(done.stdout)["dependencies"]
    except ValueError:
        versions = []
    known = [version for version in versions if "skip_reason" not in version]
    vulnerable = [version for version in known if version["vulns"]]
    for version in vulnerable:
        print(version["name"], version["version"], *(vulnerability["id"] for vulnerability in version["vulns"]))  # noqa: T201
    if not known:
        print("NOTHING WAS AUDITED: no advisory database could be reached.")  # noqa: T201
        return 2
    print(f"{len(known)} of {len(versions)} pinned versions audited, {len(vulnerable)} with known vulnerabilities.")  # noqa: T201
    return 1 if vulnerable else 0


if __name__ == "__main__":
    sys.exit(main())
