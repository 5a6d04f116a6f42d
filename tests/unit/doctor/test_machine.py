"""The files a system describes itself in: read as they are, and never an error."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from kvlayer.doctor.machine import Machine

if TYPE_CHECKING:
    from conftest import Build, Fake  # type: ignore[import-not-found]

MOUNTS = """\
22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw,discard
23 22 0:20 / /proc rw - proc proc rw
24 22 0:30 / /mnt/with\\040space rw,noatime master:3 - xfs /dev/vdb rw
25 22 0:31 / /mnt/nv rw - ext4 /dev/vdc rw
26 22 0:32 /sub /mnt/nvme rw - tmpfs tmpfs rw,size=1024k
27 22 0:33 / /mnt/nvme rw - xfs /dev/vdd rw
a line of another kernel
"""


def test_sizes_are_bytes_and_counts_are_counts(usual: Fake) -> None:
    info = usual.meminfo()
    assert info["MemTotal"] == 16 << 30
    assert info["Active(anon)"] == 100 << 10
    assert info["HugePages_Total"] == 7


def test_limits_are_the_soft_ones(usual: Fake) -> None:
    assert usual.soft_limit("Max open files") == 20000
    assert usual.soft_limit("Max locked memory") == 8 << 20
    assert usual.soft_limit("Max cpu time") == math.inf
    assert usual.soft_limit("Max something new") is None


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/", "ext4"),
        ("/home/x", "ext4"),
        ("/mnt/with space/kv", "xfs"),
        ("/mnt/nv/kv", "ext4"),
        ("/mnt/nvme", "xfs"),  # the later mount hides the earlier
        ("/mnt/nvme2", "ext4"),  # no part of /mnt/nvme
        ("/proc/self", "proc"),
    ],
)
def test_a_path_lies_on_the_mount_that_shows(machine: Build, path: str, kind: str) -> None:
    mount = machine({"/proc/self/mountinfo": MOUNTS}).mount_of(path)
    assert mount is not None and mount.kind == kind


def test_options_of_mount_and_file_system_are_both_known(machine: Build) -> None:
    mounts = machine({"/proc/self/mountinfo": MOUNTS}).mounts()
    assert len(mounts) == 6
    assert mounts[4].root == "/sub"
    assert {"rw", "size=1024k"} <= mounts[4].options


def test_where_nothing_is_said_nothing_is_known(machine: Build) -> None:
    silent = machine()
    assert silent.text("/proc/meminfo") is None
    assert silent.meminfo() == {}
    assert silent.soft_limit("Max open files") is None
    assert silent.mount_of("/") is None
    assert silent.number("/proc/sys/vm/overcommit_memory") is None


def test_words_are_no_number_and_strange_bytes_no_error(machine: Build) -> None:
    fake = machine({"/sys/max": "max\n", "/sys/one": " 1\n"})
    fake.path("/sys/strange").write_bytes(b"\xff\xfe 12")
    assert (fake.number("/sys/max"), fake.number("/sys/one")) == (None, 1)
    assert fake.number("/sys/strange") is None


def test_this_machine_can_be_read() -> None:
    here = Machine()
    assert here.meminfo()["MemTotal"] > 0
    assert here.mount_of("/proc") is not None
    assert here.space("/") is not None
    assert here.space(str(Path("/no/such/place"))) is None
    files = here.soft_limit("Max open files")
    assert files is not None and files > 0
