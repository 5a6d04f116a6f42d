"""Python, CPUs and clocks: what is fine, what is odd, what is not said."""

from __future__ import annotations

import platform
from typing import TYPE_CHECKING

import pytest

from kvlayer.doctor.finding import Status
from kvlayer.doctor.machine import Machine
from kvlayer.doctor.system import Clocks, clocks, cpus, python

if TYPE_CHECKING:
    from conftest import Build  # type: ignore[import-not-found]

NOW = 1_800_000_000.0


def status(allowed: str) -> dict[str, str]:
    return {"/proc/self/status": f"Name:\tpython\nCpus_allowed_list:\t{allowed}\n"}


def quota(text: str) -> dict[str, str]:
    return {
        "/proc/self/cgroup": "0::/\n",
        "/proc/self/mountinfo": "30 1 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n",
        "/sys/fs/cgroup/cpu.max": text,
    }


def test_this_python_is_fine_here() -> None:
    found = python()
    assert found.status is Status.OK
    assert platform.python_version() in found.found


def test_another_system_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    found = python()
    assert found.status is Status.WARN
    assert "Darwin" in found.found


@pytest.mark.parametrize(
    ("allowed", "count"), [("0-1", 2), ("0-3,8", 5), ("2,4,6", 3), ("0-127", 128)]
)
def test_cpus_are_those_the_process_may_use(machine: Build, allowed: str, count: int) -> None:
    found = cpus(machine(status(allowed)))
    assert (found.status, found.detail["usable"]) == (Status.OK, count)


def test_one_cpu_is_a_warning(machine: Build) -> None:
    found = cpus(machine(status("5")))
    assert found.status is Status.WARN
    assert found.found.startswith("1 CPU may")


def test_a_quota_below_two_cpus_is_a_warning_however_many_there_are(machine: Build) -> None:
    found = cpus(machine(status("0-63") | quota("150000 100000")))
    assert found.status is Status.WARN
    assert found.detail == {"allowed": 64, "quota": 1.5, "usable": 1.5}


def test_a_large_quota_is_fine(machine: Build) -> None:
    assert cpus(machine(status("0-63") | quota("400000 100000"))).status is Status.OK


def test_cpus_may_be_unknown(machine: Build) -> None:
    assert cpus(machine()).status is Status.UNKNOWN


def test_this_machine_has_cpus() -> None:
    usable = cpus(Machine()).detail["usable"]
    assert isinstance(usable, (int, float)) and usable > 0


@pytest.mark.parametrize(
    ("wall", "monotonic", "expected"),
    [
        (NOW + 5.0, 5.0, Status.OK),
        (NOW + 5.9, 5.0, Status.OK),
        (NOW - 1.0, 5.0, Status.WARN),  # set back
        (NOW + 3600.0, 5.0, Status.WARN),  # set forward
        (100.0, 5.0, Status.WARN),  # 1970
    ],
)
def test_a_wall_clock_that_jumps_or_is_absurd_is_a_warning(
    wall: float, monotonic: float, expected: Status
) -> None:
    before = Clocks(100.0 - 5.0 if wall == 100.0 else NOW, 0.0)
    assert clocks(before, Clocks(wall, monotonic)).status is expected


def test_this_machines_clocks_go_on_together() -> None:
    assert clocks(Clocks.now(), Clocks.now()).status is Status.OK
