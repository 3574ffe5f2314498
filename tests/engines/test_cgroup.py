"""CPU quotas on trees of files as Linux shows them."""

from pathlib import Path

import pytest

from app.engines.cgroup import cpu_quota
from app.engines.hardware import available_cpus

V2 = "30 23 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate"
V1 = "32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw,relatime shared:9 - cgroup cgroup rw,cpu,cpuacct"
OTHER = "33 31 0:30 / /sys/fs/cgroup/cpuset rw,relatime - cgroup cgroup rw,cpuset"
DOCKER_V1 = "32 31 0:29 /docker/abc /sys/fs/cgroup/cpu ro,relatime - cgroup cgroup rw,cpu"


def system(folder: Path, mountinfo: list[str], cgroup: list[str], **files: str) -> Path:
    """A root file system; `files` are below /sys/fs/cgroup, their names with `__` in place of `/`."""
    (folder / "proc/self").mkdir(parents=True)
    (folder / "proc/self/mountinfo").write_text("\n".join(mountinfo) + "\n")
    (folder / "proc/self/cgroup").write_text("\n".join(cgroup) + "\n")
    for name, text in files.items():
        file = folder / "sys/fs/cgroup" / name.replace("__", "/").replace("_max", ".max").replace("cpu_cfs", "cpu.cfs")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text + "\n")
    return folder


@pytest.mark.parametrize(
    ("mountinfo", "cgroup", "files", "quota"),
    [
        ([V2], ["0::/"], {"cpu_max": "150000 100000"}, 1.5),
        ([V2], ["0::/"], {"cpu_max": "max 100000"}, None),
        ([V2], ["0::/"], {}, None),
        ([V2], ["0::/a/b"], {"a__b__cpu_max": "300000 100000"}, 3.0),
        ([V2], ["0::/a/b"], {"a__cpu_max": "200000 100000", "a__b__cpu_max": "max 100000"}, 2.0),
        ([V2], ["0::/a/b"], {"a__cpu_max": "200000 100000", "a__b__cpu_max": "100000 100000"}, 1.0),
        ([V2], ["0::/a"], {"a__c__cpu_max": "100000 100000"}, None),
        ([V2], ["0::/../outside"], {"cpu_max": "400000 100000"}, 4.0),
        ([V2], ["0::/a"], {"a__cpu_max": "broken"}, None),
        ([V1, OTHER], ["4:cpu,cpuacct:/a", "3:cpuset:/x"],
         {"cpu,cpuacct__a__cpu_cfs_quota_us": "250000", "cpu,cpuacct__a__cpu_cfs_period_us": "100000"}, 2.5),
        ([V1], ["4:cpu,cpuacct:/a/b"],
         {"cpu,cpuacct__a__cpu_cfs_quota_us": "100000", "cpu,cpuacct__a__cpu_cfs_period_us": "50000",
          "cpu,cpuacct__a__b__cpu_cfs_quota_us": "-1", "cpu,cpuacct__a__b__cpu_cfs_period_us": "100000"}, 2.0),
        ([DOCKER_V1], ["4:cpu,cpuacct:/docker/abc"],
         {"cpu__cpu_cfs_quota_us": "300000", "cpu__cpu_cfs_period_us": "100000"}, 3.0),
        ([DOCKER_V1], ["4:cpu:/docker/abc/inner"],
         {"cpu__cpu_cfs_quota_us": "300000", "cpu__cpu_cfs_period_us": "100000",
          "cpu__inner__cpu_cfs_quota_us": "200000", "cpu__inner__cpu_cfs_period_us": "100000"}, 2.0),
        ([V1, V2], ["4:cpu,cpuacct:/", "0::/a"], {"a__cpu_max": "100000 100000"}, 1.0),
        (["broken"], ["0::/"], {"cpu_max": "100000 100000"}, None),
        ([V2], ["broken"], {"cpu_max": "100000 100000"}, None),
    ],
)  # fmt: skip
def test_quota_is_the_least_of_all_groups(
    tmp_path: Path, mountinfo: list[str], cgroup: list[str], files: dict[str, str], quota: float | None
) -> None:
    assert cpu_quota(system(tmp_path, mountinfo, cgroup, **files)) == quota


def test_system_without_control_groups_has_no_quota(tmp_path: Path) -> None:
    assert cpu_quota(tmp_path) is None
    assert available_cpus(tmp_path) >= 1


@pytest.mark.parametrize(("maximum", "cpus"), [("100000 100000", 1), ("50000 100000", 1), ("190000 100000", 1)])
def test_cpus_are_the_whole_ones_of_the_quota(tmp_path: Path, maximum: str, cpus: int) -> None:
    assert available_cpus(system(tmp_path, [V2], ["0::/pod/container"], pod__cpu_max=maximum)) == cpus
