"""Control groups, versions 1 and 2, as hosts and containers show them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from kvlayer.doctor.cgroup import cpu_quota, memory_limit

if TYPE_CHECKING:
    from conftest import Build  # type: ignore[import-not-found]

CG = "/sys/fs/cgroup"
V2 = f"30 1 0:26 / {CG} rw - cgroup2 cgroup2 rw\n"
MIB = 1 << 20


def v2(path: str, files: dict[str, str], *, mount: str = V2) -> dict[str, str]:
    tree = {"/proc/self/cgroup": f"0::{path}\n", "/proc/self/mountinfo": mount}
    return tree | {f"{CG}/{name}": text for name, text in files.items()}


def v1(path: str, files: dict[str, str], *, root: str = "/") -> dict[str, str]:
    controllers = ("memory", "cpu,cpuacct")
    mounts = "".join(
        f"3{i} 1 0:2{i} {root} {CG}/{name} rw - cgroup cgroup rw,{name}\n"
        for i, name in enumerate(controllers)
    )
    unified = f"40 1 0:40 / {CG}/unified rw - cgroup2 cgroup2 rw\n"
    groups = f"4:memory:{path}\n3:cpu,cpuacct:{path}\n0::/\n"
    tree = {"/proc/self/cgroup": groups, "/proc/self/mountinfo": unified + mounts}
    return tree | {f"{CG}/{name}": text for name, text in files.items()}


def test_version_2_counts_what_cannot_be_dropped(machine: Build) -> None:
    files = {
        "app/memory.max": f"{512 * MIB}\n",
        "app/memory.current": f"{300 * MIB}\n",
        "app/memory.stat": f"anon 5\ninactive_file {100 * MIB}\nactive_file 7\n",
    }
    limit = memory_limit(machine(v2("/app", files)))
    assert limit is not None
    assert (limit.limit_nbytes, limit.used_nbytes) == (512 * MIB, 200 * MIB)
    assert limit.free_nbytes == 312 * MIB


def test_the_group_above_may_be_the_tighter_one(machine: Build) -> None:
    files = {
        "pod/memory.max": f"{256 * MIB}",
        "pod/memory.current": f"{200 * MIB}",
        "pod/app/memory.max": f"{512 * MIB}",
        "pod/app/memory.current": f"{10 * MIB}",
    }
    limit = memory_limit(machine(v2("/pod/app", files)))
    assert limit is not None
    assert (limit.group, limit.free_nbytes) == (f"{CG}/pod", 56 * MIB)


@pytest.mark.parametrize("path", ["/", "/not/visible/here", "/../sibling"])
def test_a_container_sees_its_own_group_as_the_root(machine: Build, path: str) -> None:
    files = {"memory.max": f"{64 * MIB}", "memory.current": f"{80 * MIB}"}
    limit = memory_limit(machine(v2(path, files)))
    assert limit is not None
    assert limit.limit_nbytes == 64 * MIB
    assert limit.free_nbytes == 0  # over the limit for a moment: no negative room


def test_no_limit_is_none(machine: Build) -> None:
    assert memory_limit(machine(v2("/app", {"app/memory.max": "max\n"}))) is None


def test_version_1_has_its_own_names_and_its_own_no_limit(machine: Build) -> None:
    files = {
        "memory/memory.limit_in_bytes": "9223372036854771712\n",
        "memory/app/memory.limit_in_bytes": f"{128 * MIB}\n",
        "memory/app/memory.usage_in_bytes": f"{100 * MIB}\n",
        "memory/app/memory.stat": f"inactive_file 1\ntotal_inactive_file {60 * MIB}\n",
    }
    limit = memory_limit(machine(v1("/app", files)))
    assert limit is not None
    assert (limit.limit_nbytes, limit.used_nbytes) == (128 * MIB, 40 * MIB)
    assert memory_limit(machine(v1("/", files))) is None  # outside that group


def test_version_1_in_a_container_mounts_the_group_itself(machine: Build) -> None:
    files = {
        "memory/memory.limit_in_bytes": f"{128 * MIB}\n",
        "memory/memory.usage_in_bytes": f"{28 * MIB}\n",
    }
    limit = memory_limit(machine(v1("/docker/abc", files, root="/docker/abc")))
    assert limit is not None and limit.free_nbytes == 100 * MIB


@pytest.mark.parametrize(
    ("tree", "quota"),
    [
        (v2("/app", {"app/cpu.max": "150000 100000\n"}), 1.5),
        (v2("/app", {"app/cpu.max": "max 100000\n"}), None),
        (v2("/a/b", {"a/cpu.max": "50000 100000", "a/b/cpu.max": "max 100000"}), 0.5),
        (v2("/app", {"app/cpu.max": "strange\n"}), None),
        (
            v1(
                "/app",
                {
                    "cpu,cpuacct/app/cpu.cfs_quota_us": "400000\n",
                    "cpu,cpuacct/app/cpu.cfs_period_us": "100000\n",
                },
            ),
            4.0,
        ),
        (
            v1(
                "/app",
                {
                    "cpu,cpuacct/app/cpu.cfs_quota_us": "-1\n",
                    "cpu,cpuacct/app/cpu.cfs_period_us": "100000\n",
                },
            ),
            None,
        ),
    ],
)
def test_a_quota_is_so_many_cpus(machine: Build, tree: dict[str, str], quota: float | None) -> None:
    assert cpu_quota(machine(tree)) == quota


def test_without_proc_nothing_is_limited(machine: Build) -> None:
    assert memory_limit(machine()) is None
    assert cpu_quota(machine()) is None


def test_a_group_without_a_mount_is_not_guessed(machine: Build) -> None:
    assert memory_limit(machine(v2("/app", {"app/memory.max": "1"}, mount=""))) is None
