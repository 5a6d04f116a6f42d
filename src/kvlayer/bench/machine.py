"""What figures were taken on. What the system does not tell is None."""

from __future__ import annotations

import os
import platform
import re
import sys
from pathlib import Path

from kvlayer.doctor.cgroup import memory_limit
from kvlayer.doctor.machine import Machine

__all__ = ["describe", "file_system"]


def describe() -> dict[str, object]:
    """Processors, memory, versions. Reads small files; imports nothing heavy."""
    machine = Machine()
    model = re.search(r"^model name\s*:\s*(.+)$", machine.text("/proc/cpuinfo") or "", re.MULTILINE)
    limit = memory_limit(machine)
    torch = sys.modules.get("torch")  # only what the measurements themselves have imported
    return {
        "cpus": len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count(),
        "model": None if model is None else model[1],
        "machine": platform.machine(),
        "system": f"{platform.system()} {platform.release()}",
        "memory_nbytes": machine.meminfo().get("MemTotal"),
        "memory_limit_nbytes": None if limit is None else limit.limit_nbytes,
        "python": platform.python_version(),
        "torch": None if torch is None else str(torch.__version__),
        "torch_threads": None if torch is None else int(torch.get_num_threads()),
    }


def file_system(directory: Path) -> str | None:
    """The type of the file system a directory lies on, such as ``ext4`` or ``tmpfs``."""
    mount = Machine().mount_of(str(directory.resolve()))
    return None if mount is None else mount.kind
