"""Whether the slab fits where it is to go, and can be made at all."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from kvlayer.doctor import memory
from kvlayer.doctor.finding import Status
from kvlayer.doctor.machine import Machine, Space

if TYPE_CHECKING:
    from conftest import Build, Fake  # type: ignore[import-not-found]

GIB = 1 << 30


def group(limit: int, used: int) -> dict[str, str]:
    return {
        "/proc/self/cgroup": "0::/\n",
        "/proc/self/mountinfo": "30 1 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n",
        "/sys/fs/cgroup/memory.max": f"{limit}\n",
        "/sys/fs/cgroup/memory.current": f"{used}\n",
    }


@pytest.mark.parametrize(
    ("host", "expected"),
    [(2 * GIB, Status.OK), (3 * GIB, Status.OK), (3 * GIB + 1, Status.WARN), (5 * GIB, Status.BAD)],
)
def test_a_slab_larger_than_the_group_allows_will_not_work(
    machine: Build, host: int, expected: Status
) -> None:
    found = memory.group_memory(machine(group(4 * GIB, GIB)), host)
    assert found.status is expected
    assert "4 GiB" in found.found
    assert found.detail["limit_nbytes"] == 4 * GIB
    assert bool(found.advice) == (expected is not Status.OK)


def test_no_limit_and_no_groups_are_told_apart(machine: Build) -> None:
    fake = machine()
    assert memory.group_memory(fake, GIB).status is Status.UNKNOWN
    fake = machine({"/proc/self/cgroup": "0::/\n"})
    assert memory.group_memory(fake, GIB).status is Status.OK


@pytest.mark.parametrize(
    ("host", "expected"), [(8 * GIB, Status.OK), (9 * GIB, Status.WARN), (17 * GIB, Status.BAD)]
)
def test_a_slab_larger_than_the_machine_will_not_work(
    usual: Fake, host: int, expected: Status
) -> None:
    assert memory.machine_memory(usual, host).status is expected


def test_memory_may_be_unknown(machine: Build) -> None:
    assert memory.machine_memory(machine(), GIB).status is Status.UNKNOWN


@pytest.mark.parametrize(
    ("mode", "host", "expected"),
    [
        ("0", 100 * GIB, Status.OK),
        ("1", 100 * GIB, Status.OK),
        ("2", 6 * GIB, Status.OK),
        ("2", 7 * GIB, Status.BAD),
    ],
)
def test_strict_accounting_bounds_the_slab(
    usual: Fake, mode: str, host: int, expected: Status
) -> None:
    path = usual.path("/proc/sys/vm/overcommit_memory")
    path.parent.mkdir(parents=True)
    path.write_text(f"{mode}\n")
    assert memory.commit(usual, host).status is expected


def test_accounting_may_be_unknown(machine: Build) -> None:
    assert memory.commit(machine(), GIB).status is Status.UNKNOWN


def test_a_slab_can_be_made_here_and_none_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    real = os.memfd_create

    def note(name: str) -> int:
        made.append(real(name))
        return made[-1]

    monkeypatch.setattr(os, "memfd_create", note)
    assert memory.slab().status is Status.OK
    with pytest.raises(OSError, match="descriptor"):
        os.fstat(made[0])


def test_a_refused_memfd_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str) -> int:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "memfd_create", refuse)
    found = memory.slab()
    assert found.status is Status.WARN
    assert "not permitted" in found.found


def test_a_memfd_without_room_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, length: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "ftruncate", full)
    assert memory.slab().status is Status.WARN


def test_a_platform_without_memfd_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "memfd_create")
    assert memory.slab().status is Status.WARN


@pytest.mark.parametrize(
    ("free", "expected"), [(64 << 20, Status.WARN), (GIB, Status.OK), (None, Status.UNKNOWN)]
)
def test_a_containers_default_dev_shm_is_a_warning(
    machine: Build, free: int | None, expected: Status
) -> None:
    fake = machine()
    if free is not None:
        fake.spaces[memory._SHM] = Space(free, free, 100)
    assert memory.shared_memory(fake).status is expected


def test_what_may_be_locked_is_said_and_is_no_trouble_yet(usual: Fake, machine: Build) -> None:
    found = memory.locking(usual)
    assert (found.status, found.detail) == (Status.OK, {"limit_nbytes": 8 << 20})
    usual.path("/proc/self/limits").write_text("Max locked memory   unlimited  unlimited  bytes\n")
    assert memory.locking(usual).detail == {"limit_nbytes": None}
    usual.path("/proc/self/limits").unlink()
    assert memory.locking(usual).status is Status.UNKNOWN


def test_this_machine_answers_every_question() -> None:
    here = Machine()
    for found in (
        memory.group_memory(here, 0),
        memory.machine_memory(here, 0),
        memory.commit(here, 0),
        memory.locking(here),
    ):
        assert found.status is Status.OK, found
