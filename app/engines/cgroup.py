"""The CPU quota of this process's control groups, versions 1 and 2, nested ones included."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple


class Mount(NamedTuple):
    """A cgroup file system: what it shows of the hierarchy, from `root` downwards, lies at `point`."""

    root: str
    point: str
    version: int


def cpu_quota(system: Path = Path("/")) -> float | None:
    """The least quota, in CPUs, of the process's group and all groups above it; None without a quota.

    `system` is the root of the file system that holds `proc` and the mounts.
    """
    try:
        mounts = list(_mounts((system / "proc/self/mountinfo").read_text()))
        paths = dict(_paths((system / "proc/self/cgroup").read_text()))
    except (OSError, ValueError, IndexError):
        return None
    quotas = [
        quota
        for mount in mounts
        if mount.version in paths
        for group in _groups(mount, paths[mount.version])
        if (quota := _quota(system / group.relative_to("/"), mount.version)) is not None
    ]
    return min(quotas, default=None)


def _mounts(mountinfo: str) -> Iterator[Mount]:
    """proc(5): ID PARENT DEVICE ROOT POINT OPTIONS [FIELDS...] - TYPE SOURCE SUPER_OPTIONS."""
    for line in mountinfo.splitlines():
        before, _, after = line.partition(" - ")
        fields, (kind, _, options) = before.split(), after.split(maxsplit=2)
        if kind == "cgroup2" or (kind == "cgroup" and "cpu" in options.split(",")):
            yield Mount(fields[3], fields[4].replace("\\040", " "), 2 if kind == "cgroup2" else 1)


def _paths(cgroup: str) -> Iterator[tuple[int, str]]:
    """cgroups(7): ID:CONTROLLERS:PATH, for version 2 without controllers."""
    for line in cgroup.splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            yield 2, path
        elif "cpu" in controllers.split(","):
            yield 1, path


def _groups(mount: Mount, path: str) -> list[Path]:
    """The folders of the group and those above it; the mount alone where the group lies outside of what it shows."""
    point = Path(mount.point)
    if path != mount.root and not path.startswith(mount.root.rstrip("/") + "/"):
        return [point]
    parts = Path(path.removeprefix(mount.root).lstrip("/")).parts
    return [point.joinpath(*parts[:depth]) for depth in range(len(parts) + 1)] if ".." not in parts else [point]


def _quota(group: Path, version: int) -> float | None:
    try:
        if version == 2:
            quota, period = (group / "cpu.max").read_text().split()
        else:
            quota, period = ((group / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return None if quota == "max" or int(quota) <= 0 else int(quota) / int(period)
    except (OSError, ValueError, ZeroDivisionError):
        return None
