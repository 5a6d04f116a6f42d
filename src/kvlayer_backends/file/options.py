"""What a ``file://`` URL may say."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from kvlayer.errors import ConfigError
from kvlayer.urls import parse_bytes

__all__ = ["FileOptions"]


def _direct(text: str) -> str:
    if text not in ("auto", "on", "off"):
        raise ConfigError("file:// direct is no direct I/O mode", hint="write auto, on or off")
    return text


@dataclass(frozen=True, slots=True)
class FileOptions:
    """Options of ``file:///dir?name=value``. Raises ``ConfigError`` for a value out of range."""

    capacity: int = field(default=0, metadata={"parse": parse_bytes})
    """Bytes the directory may hold; 0 means no limit."""
    policy: str = "prefix-lru"
    """Which registered eviction policy chooses what to give up."""
    threads: int = 8
    """Reads and writes that run at once."""
    fsync: bool = False
    """Whether a put returns only once file and directory are on the medium."""
    direct: str = field(default="auto", metadata={"parse": _direct})
    """O_DIRECT: ``auto`` where the filesystem allows it, ``on`` or open fails, ``off``."""
    readonly: bool = False
    """Write nothing at all: no puts, no marks of use, no janitor."""
    interval: float = 5.0
    """Seconds between two passes of the janitor, and between two tries to become it."""

    def __post_init__(self) -> None:
        _direct(self.direct)
        if self.capacity < 0:
            raise ConfigError("file:// capacity must be >= 0", hint="0 means no limit")
        if self.threads < 1:
            raise ConfigError("file:// threads must be at least 1", hint="8 is the default")
        if not (math.isfinite(self.interval) and self.interval > 0):
            raise ConfigError("file:// interval must be > 0 seconds", hint="5 is the default")
        if not self.policy:
            raise ConfigError("file:// policy is empty", hint="try prefix-lru or lru")
