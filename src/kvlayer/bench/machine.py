"""What figures were taken on. What the system does not tell is None."""

from __future__ import annotations

import os
import platform
import re
import sys
from pathlib import Path

__all__ = ["describe", "file_system"]

_UNLIMITED = 1 << 60  # cgroup v1 writes "no limit" as a number near 2^63


def describe() -> dict[str, object]:
    """Processors, memory, versions. Reads small files; imports nothing heavy."""
    torch = sys.modules.get("torch")  # only what the measurements themselves have imported
    return {
        "cpus": len(os.sched_getaffinity(0)),
        "model": _match("/proc/cpuinfo", r"^model name\s*:\s*(.+)$"),
        "machine": platform.machine(),
        "system": f"{platform.system()} {platform.release()}",
        "memory_nbytes": _kib("/proc/meminfo", r"^MemTotal:\s+(\d+) kB$"),
        "memory_limit_nbytes": _cgroup_limit(),
        "python": platform.python_version(),
        "torch": None if torch is None else str(torch.__version__),
        "torch_threads": None if torch is None else int(torch.get_num_threads()),
    }


def file_system(directory: Path) -> str | None:
    """The type of the file system a directory lies on, such as ``ext4`` or ``tmpfs``."""
    path, kind, length = f"{directory.resolve()}/", None, -1
    for line in _text("/proc/self/mountinfo").splitlines():
        mount, _, system = line.partition(" - ")
        point = re.sub(r"\\([0-7]{3})", lambda m: chr(int(m[1], 8)), mount.split()[4])
        # Of two mounts at one point the later hides the earlier.
        if path.startswith(f"{point.rstrip('/')}/") and len(point) >= length:
            kind, length = system.split()[0], len(point)
    return kind


def _cgroup_limit() -> int | None:
    """The tightest memory limit of this process's control group and those above it."""
    limits: list[int] = []
    for line in _text("/proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        names = controllers.split(",")
        if controllers and "memory" not in names:
            continue
        root = Path("/sys/fs/cgroup/memory" if controllers else "/sys/fs/cgroup")
        file = "memory.limit_in_bytes" if controllers else "memory.max"
        group = root / path.lstrip("/")
        for at in (group, *group.parents):
            text = _text(at / file).strip()
            if text.isdigit() and int(text) < _UNLIMITED:
                limits.append(int(text))
            if at == root:
                break
    return min(limits, default=None)


def _kib(path: str, pattern: str) -> int | None:
    found = _match(path, pattern)
    return None if found is None else int(found) * 1024


def _match(path: str, pattern: str) -> str | None:
    found = re.search(pattern, _text(path), re.MULTILINE)
    return None if found is None else found[1]


def _text(path: str | Path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:  # not Linux, or hidden from this container
        return ""
