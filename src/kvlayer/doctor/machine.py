"""What the system says about itself: files below a root, which a test may fake."""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Machine", "Mount", "Space"]

_NUMBER = "[0-9]{1,20}"  # what fits 64 bits; anything longer is no number of the kernel's
_ROW = re.compile(rf"^([\w()]+):?\s+({_NUMBER})( kB)?\s*$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Mount:
    """One line of mountinfo."""

    root: str
    """The directory of the file system that is mounted."""
    point: str
    """Where it is mounted."""
    kind: str
    """The file system's type, such as ``ext4``."""
    options: frozenset[str]
    """Options of the mount and of the file system."""


@dataclass(frozen=True, slots=True)
class Space:
    """Room in a file system."""

    total_nbytes: int
    free_nbytes: int
    """What an unprivileged process may still write."""
    free_inodes: int | None
    """Files that may still be created; None where inodes are made as needed."""


class Machine:
    """Reads ``/proc`` and ``/sys`` below ``root``. What is missing or strange is None, no error."""

    def __init__(self, root: Path = Path("/")) -> None:
        self.root = root

    def path(self, path: str) -> Path:
        return self.root / path.lstrip("/")

    def text(self, path: str) -> str | None:
        """The contents of a small file."""
        try:
            return self.path(path).read_text(encoding="utf-8", errors="replace")
        except (OSError, ValueError):  # not Linux, hidden from this container, or no path at all
            return None

    def is_directory(self, path: str) -> bool:
        try:
            return self.path(path).is_dir()
        except OSError:  # longer than a path may be, or hidden from this user
            return False

    def number(self, path: str) -> int | None:
        """A file that holds one whole number; None also for words like ``max``."""
        text = self.text(path)
        try:
            return None if text is None else int(text)
        except ValueError:
            return None

    def table(self, path: str) -> dict[str, int]:
        """Lines of ``name value`` or ``name: value kB``, in bytes where a unit is given."""
        found = _ROW.findall(self.text(path) or "")
        return {name: int(number) * (1024 if unit else 1) for name, number, unit in found}

    def meminfo(self) -> dict[str, int]:
        """``/proc/meminfo`` in bytes."""
        return self.table("/proc/meminfo")

    def soft_limit(self, name: str) -> float | None:
        """A resource limit of this process by its name in ``/proc/self/limits``; inf: none."""
        limits = self.text("/proc/self/limits") or ""
        match = re.search(rf"^{re.escape(name)}\s+({_NUMBER}|unlimited)\s", limits, re.MULTILINE)
        if match is None:
            return None
        return math.inf if match[1] == "unlimited" else int(match[1])

    def mounts(self) -> list[Mount]:
        """Every mount this process sees, in the order they were made."""
        found: list[Mount] = []
        for line in (self.text("/proc/self/mountinfo") or "").splitlines():
            mount, _, system = line.partition(" - ")
            head, tail = mount.split(), system.split()
            if len(head) < 6 or len(tail) < 3:
                continue
            options = frozenset(f"{head[5]},{tail[2]}".split(","))
            found.append(Mount(_unescaped(head[3]), _unescaped(head[4]), tail[0], options))
        return found

    def mount_of(self, path: str) -> Mount | None:
        """The mount an absolute path without symbolic links lies on."""
        over: Mount | None = None
        for mount in self.mounts():
            inside = mount.point == "/" or f"{path}/".startswith(f"{mount.point}/")
            if inside and (over is None or len(mount.point) >= len(over.point)):
                over = mount  # of two at one point the later hides the earlier
        return over

    def space(self, path: str) -> Space | None:
        """Room in the file system of ``path``."""
        try:
            found = os.statvfs(self.path(path))
        except OSError:
            return None
        return Space(
            found.f_blocks * found.f_frsize,
            found.f_bavail * found.f_frsize,
            found.f_favail if found.f_files else None,
        )


def _unescaped(text: str) -> str:
    """mountinfo writes a space as ``\\040``."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)
