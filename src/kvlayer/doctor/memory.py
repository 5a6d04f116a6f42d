"""Whether the host slab fits: control groups, the machine's memory, overcommit, memfd, locking."""

from __future__ import annotations

import math
import mmap
import os

from kvlayer.doctor.cgroup import memory_limit
from kvlayer.doctor.finding import Check, Finding
from kvlayer.doctor.machine import Machine
from kvlayer.urls import format_bytes

__all__ = ["commit", "group_memory", "locking", "machine_memory", "shared_memory", "slab"]

_GROUP = Check(
    "cgroup-memory",
    "the slab is shared memory, charged to the control group as it is first used: past the limit "
    "the kernel kills the process",
)
_MEMORY = Check(
    "memory", "the slab's pages are committed as they are first used, and cannot be dropped"
)
_COMMIT = Check(
    "overcommit",
    "with strict accounting the process dies at the first page of the slab past the commit limit",
)
_SLAB = Check(
    "slab",
    "the ranks of one host share the slab by its descriptor; without memfd it is memory of this "
    "process alone",
)
_SHM_CHECK = Check(
    "dev-shm", "the slab does not lie there, but the worker processes of engines meet there"
)
_LOCKING = Check(
    "memlock", "memory registered with a network card counts against it; none is registered yet"
)

_SHM = "/dev/shm"  # noqa: S108  # asked about, not written to
_SMALL_SHM = 1 << 30  # container runtimes give 64 MiB where nobody asks for more


def group_memory(machine: Machine, host_nbytes: int) -> Finding:
    """The control group's limit against the host tier's capacity."""
    limit = memory_limit(machine)
    if limit is None:
        if machine.text("/proc/self/cgroup") is None:
            return _GROUP.unknown("this system does not say which control group limits memory")
        return _GROUP.ok("no control group limits this process's memory")
    detail: dict[str, object] = {
        "group": limit.group,
        "limit_nbytes": limit.limit_nbytes,
        "used_nbytes": limit.used_nbytes,
        "host_nbytes": host_nbytes,
    }
    found = (
        f"{format_bytes(limit.used_nbytes)} of a limit of {format_bytes(limit.limit_nbytes)} are "
        f"in use; host memory is to hold {format_bytes(host_nbytes)}"
    )
    if host_nbytes <= limit.free_nbytes:
        return _GROUP.ok(found, **detail)
    say = _GROUP.bad if host_nbytes > limit.limit_nbytes else _GROUP.warn
    return say(
        found,
        "raise the container's memory limit, or lower the capacity of the cpu:// tier; of the "
        f"{format_bytes(limit.free_nbytes)} that are left the engine needs some, too",
        **detail,
    )


def machine_memory(machine: Machine, host_nbytes: int) -> Finding:
    """The machine's memory against the host tier's capacity."""
    info = machine.meminfo()
    if "MemTotal" not in info:
        return _MEMORY.unknown("this system does not say how much memory it has")
    total = info["MemTotal"]
    available = info.get("MemAvailable", info.get("MemFree", 0))
    detail: dict[str, object] = {
        "total_nbytes": total,
        "available_nbytes": available,
        "host_nbytes": host_nbytes,
    }
    found = (
        f"{format_bytes(available)} of {format_bytes(total)} are available; host memory is to "
        f"hold {format_bytes(host_nbytes)}"
    )
    if host_nbytes <= available:
        return _MEMORY.ok(found, **detail)
    say = _MEMORY.bad if host_nbytes > total else _MEMORY.warn
    return say(found, "lower the capacity of the cpu:// tier", **detail)


def commit(machine: Machine, host_nbytes: int) -> Finding:
    """Whether the kernel hands out more memory than it could make good."""
    mode = machine.number("/proc/sys/vm/overcommit_memory")
    if mode is None:
        return _COMMIT.unknown("this system does not say how it accounts for memory")
    if mode != 2:
        found = f"vm.overcommit_memory is {mode}: the slab is not accounted for in advance"
        return _COMMIT.ok(found, mode=mode)
    info = machine.meminfo()
    left = max(info.get("CommitLimit", 0) - info.get("Committed_AS", 0), 0)
    found = (
        f"vm.overcommit_memory is 2 and {format_bytes(left)} may still be committed; host memory "
        f"is to hold {format_bytes(host_nbytes)}"
    )
    if host_nbytes <= left:
        return _COMMIT.ok(found, mode=mode, left_nbytes=left, host_nbytes=host_nbytes)
    advice = "lower the capacity of the cpu:// tier, or raise vm.overcommit_ratio"
    return _COMMIT.bad(found, advice, mode=mode, left_nbytes=left, host_nbytes=host_nbytes)


def slab() -> Finding:
    """Whether a slab other processes can map can be made: one of two pages is."""
    advice = "allow memfd_create in the container (its seccomp profile)"
    if not hasattr(os, "memfd_create"):
        return _SLAB.warn("this Python has no memfd_create", "serve from Linux")
    try:
        fd = os.memfd_create("kvlayer-doctor")
    except OSError as exc:
        return _SLAB.warn(f"memfd_create is refused: {exc}", advice)
    try:
        os.ftruncate(fd, 2 * mmap.PAGESIZE)
        with mmap.mmap(fd, 2 * mmap.PAGESIZE) as pages:
            pages[-1] = 1
    except OSError as exc:
        return _SLAB.warn(f"a memfd cannot be mapped: {exc}", advice)
    finally:
        os.close(fd)
    return _SLAB.ok("memfd_create works")


def shared_memory(machine: Machine) -> Finding:
    """The size of /dev/shm, which the slab does not need and engines do."""
    space = machine.space(_SHM)
    if space is None:
        return _SHM_CHECK.unknown(f"there is no {_SHM}")
    detail: dict[str, object] = {
        "total_nbytes": space.total_nbytes,
        "free_nbytes": space.free_nbytes,
    }
    total, free = format_bytes(space.total_nbytes), format_bytes(space.free_nbytes)
    found = f"{free} of {total} are free"
    if space.free_nbytes < _SMALL_SHM:
        advice = "give the container more (--shm-size=8g, or an emptyDir with medium: Memory)"
        return _SHM_CHECK.warn(found, advice, **detail)
    return _SHM_CHECK.ok(found, **detail)


def locking(machine: Machine) -> Finding:
    """How much memory this process may lock."""
    limit = machine.soft_limit("Max locked memory")
    if limit is None:
        return _LOCKING.unknown("this system does not say how much memory may be locked")
    if math.isinf(limit):
        return _LOCKING.ok("any amount of memory may be locked", limit_nbytes=None)
    nbytes = int(limit)
    return _LOCKING.ok(f"{format_bytes(nbytes)} may be locked", limit_nbytes=nbytes)
