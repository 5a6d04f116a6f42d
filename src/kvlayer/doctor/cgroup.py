"""What the control groups around this process allow it: memory and CPU time, version 1 or 2."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath

from kvlayer.doctor.machine import Machine

__all__ = ["MemoryLimit", "cpu_quota", "memory_limit"]

_COUNT = re.compile(r"\s*[0-9]{1,20}\s*")
_UNLIMITED = 1 << 60  # version 1 says "no limit" as the largest multiple of a page


@dataclass(frozen=True, slots=True)
class MemoryLimit:
    """The group that leaves this process the least room."""

    group: str
    limit_nbytes: int
    used_nbytes: int
    """Charged to the group, without file pages that can be dropped."""

    @property
    def free_nbytes(self) -> int:
        return max(self.limit_nbytes - self.used_nbytes, 0)


def memory_limit(machine: Machine) -> MemoryLimit | None:
    """None when no group around this process limits its memory, or nothing says so."""
    found: list[MemoryLimit] = []
    for version, group in _groups(machine, "memory"):
        names = _NAMES[version]
        limit = machine.number(f"{group}/{names.limit}")
        if limit is None or limit >= _UNLIMITED:
            continue
        used = machine.number(f"{group}/{names.used}") or 0
        droppable = machine.table(f"{group}/memory.stat").get(names.droppable, 0)
        found.append(MemoryLimit(group, limit, max(used - droppable, 0)))
    return min(found, key=lambda each: each.free_nbytes, default=None)


def cpu_quota(machine: Machine) -> float | None:
    """CPUs' worth of time that the tightest group allows; None without a limit."""
    found: list[float] = []
    for version, group in _groups(machine, "cpu"):
        if version == 2:
            quota, _, period = (machine.text(f"{group}/cpu.max") or "").partition(" ")
        else:
            quota = machine.text(f"{group}/cpu.cfs_quota_us") or ""
            period = machine.text(f"{group}/cpu.cfs_period_us") or ""
        if _COUNT.fullmatch(quota) and _COUNT.fullmatch(period) and int(period):
            found.append(int(quota) / int(period))
    return min(found, default=None)


@dataclass(frozen=True, slots=True)
class _Names:
    limit: str
    used: str
    droppable: str


_NAMES = {
    1: _Names("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    2: _Names("memory.max", "memory.current", "inactive_file"),
}


def _groups(machine: Machine, controller: str) -> Iterator[tuple[int, str]]:
    """The groups this process is in, from its own up to the mount, as (version, directory)."""
    member = _membership(machine, controller)
    if member is None:
        return
    version, path, root, point = member
    # A container may see its own group mounted as the root and yet its path from outside.
    inside = PurePosixPath(path)
    below = inside.relative_to(root) if inside.is_relative_to(root) else PurePosixPath()
    if ".." in below.parts or not machine.is_directory(f"{point}/{below}"):
        below = PurePosixPath()
    for each in (below, *below.parents):
        yield version, str(PurePosixPath(point) / each)
        if each == PurePosixPath():
            return


def _membership(machine: Machine, controller: str) -> tuple[int, str, str, str] | None:
    """Version, the process's path, and the mount's root and point of a controller's hierarchy."""
    paths: dict[str, str] = {}
    for line in (machine.text("/proc/self/cgroup") or "").splitlines():
        _, _, rest = line.partition(":")
        names, _, path = rest.partition(":")
        paths |= dict.fromkeys(names.split(","), path)
    mounts = machine.mounts()
    if controller in paths:  # both versions may be mounted; a controller is in one of them
        for mount in mounts:
            if mount.kind == "cgroup" and controller in mount.options:
                return 1, paths[controller], mount.root, mount.point
    if "" in paths:
        for mount in mounts:
            if mount.kind == "cgroup2":
                return 2, paths[""], mount.root, mount.point
    return None
