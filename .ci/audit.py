"""Looks the pinned versions up in PyPI's advisories. Exits with 1 for a known fault, 2 where none could be asked."""

import json
import subprocess
import sys


def main() -> int:
    command = ["-m", "pip_audit", "-r", "constraints.txt", "--no-deps", "--disable-pip", "--format", "json"]
    ended = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False)  # noqa: S603
    try:
        versions = json.loads(ended.stdout)["dependencies"]
    except ValueError:
        versions = []
    known = [version for version in versions if "skip_reason" not in version]
    faulty = [version for version in known if version["vulns"]]
    for version in faulty:
        print(version["name"], version["version"], *(fault["id"] for fault in version["vulns"]))  # noqa: T201
    if not known:
        print("NOTHING WAS AUDITED: no advisory database could be reached from here.")  # noqa: T201
        return 2
    print(f"{len(known)} of {len(versions)} pinned versions audited, {len(faulty)} with known faults.")  # noqa: T201
    return 1 if faulty else 0


if __name__ == "__main__":
    sys.exit(main())
