"""Whether the process may open as many files as its tiers and its engine need."""

from __future__ import annotations

import math
from collections.abc import Iterable

from kvlayer.doctor.finding import Check, Finding
from kvlayer.doctor.machine import Machine

__all__ = ["descriptors"]

_CHECK = Check(
    "descriptors",
    "each thread of a disk tier holds a file open, and each client of the engine a socket",
)

_BASE = 64  # the interpreter, the loop, the slab, logs
_PER_TIER = 16  # locks, directories, listings
_COMFORTABLE = 4096  # what a server with some clients opens beside them


def descriptors(machine: Machine, threads: Iterable[int]) -> Finding:
    """The limit of open files against the need; ``threads`` are those of each disk tier."""
    need = _BASE + sum(_PER_TIER + count for count in threads)
    limit = machine.soft_limit("Max open files")
    if limit is None:
        return _CHECK.unknown("this system does not say how many files may be open")
    if math.isinf(limit):
        return _CHECK.ok("any number of files may be open", limit=None, need=need)
    found = f"{int(limit)} files may be open at once; kvlayer needs up to {need}"
    if limit >= max(need, _COMFORTABLE):
        return _CHECK.ok(found, limit=int(limit), need=need)
    say = _CHECK.bad if limit < need else _CHECK.warn
    advice = "raise the limit (ulimit -n 65536, LimitNOFILE=65536)"
    return say(found, advice, limit=int(limit), need=need)
