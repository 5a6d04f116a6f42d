"""Thresholds of one kind of device, and the file that keeps them. ``kvlayer bench gpu`` writes it.

The defaults are what was measured on an H100 behind PCIe 5. They are starting points: what a
transfer costs depends on the link, the driver, the CPU and the host's memory.
"""

from __future__ import annotations

import json
import logging
import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from kvlayer._home import cache_directory
from kvlayer.identity.own import read_own

__all__ = ["Calibration", "load", "save"]

_log = logging.getLogger(__name__)

_VERSION = 1
_MAX_NBYTES = 64 * 1024
_LIMITS = {
    "slot_nbytes": (1 << 12, 1 << 30),
    "slots": (2, 16),
    "group_slots": (1, 1024),
    "blocks": (1, 1024),
    "direct_nbytes": (1, 1 << 40),
    "batch_runs": (1, 1 << 30),
    "gap_nbytes": (0, 1 << 20),
}


@dataclass(frozen=True, slots=True)
class Calibration:
    """What the pipeline decides by."""

    slot_nbytes: int = 16 << 20
    """One slot of the ring: large enough for the link's full speed, small enough to overlap."""
    slots: int = 3
    group_slots: int = 8
    """A load's layer group fills so many slots. Fewer, and the first layers are there sooner, while
    the CPU says more often which rows are whose."""
    blocks: int = 128
    """Thread blocks of a gather or scatter. Many are done soon: few wait long for the engine."""
    direct_nbytes: int = 1 << 20
    """A load whose average run into the cache is at least this long goes there without a ring."""
    batch_runs: int = 16
    """Copies of at least so many runs are one ``cudaMemcpyBatchAsync``."""
    gap_nbytes: int = 16 << 10
    """Runs no farther apart are read as one: what lies between costs less than another copy."""

    def __post_init__(self) -> None:
        for name, (low, high) in _LIMITS.items():
            value = getattr(self, name)
            if type(value) is not int or not low <= value <= high:
                raise ValueError(f"{name} is a number in {low}..{high}, found {value!r}")


def load(device: str, directory: Path | None = None) -> tuple[Calibration, bool]:
    """What is kept for this kind of device, or the defaults; and whether it was kept.

    ``device`` names a kind: model and architecture. A file that is damaged, or of another version,
    is not there, which is said once.
    """
    path = _path(device, directory)
    if path is None:
        return Calibration(), False
    packed = read_own(path, _MAX_NBYTES)
    if packed is None:
        if path.is_symlink() or path.exists():
            _log.warning("%s is not only this user's to write: defaults are used", path)
        return Calibration(), False
    try:
        kept = json.loads(packed)
        if kept["version"] != _VERSION or kept["device"] != device:
            raise ValueError(f"version {kept['version']} of {kept['device']}")
        return Calibration(**{field.name: kept[field.name] for field in fields(Calibration)}), True
    except (ValueError, KeyError, TypeError, RecursionError) as exc:
        _log.warning("%s is no calibration of %s (%s): defaults are used", path, device, exc)
    return Calibration(), False


def save(device: str, calibration: Calibration, directory: Path | None = None) -> Path | None:
    """Keep it for this kind of device; where, or None where a user has no directory.

    Raises ``OSError``.
    """
    path = _path(device, directory)
    if path is None:
        return None
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    kept = {"version": _VERSION, "device": device, **asdict(calibration)}
    fresh = path.with_suffix(".tmp")
    fresh.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")
    fresh.replace(path)  # a reader finds the old one or the new one
    return path


def _path(device: str, directory: Path | None) -> Path | None:
    directory = cache_directory() if directory is None else directory
    slug = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    return None if directory is None else directory / "gpu" / f"{slug}.json"
