"""What knowing an object costs that only lower tiers hold: memory, and stops of the process."""

from __future__ import annotations

import gc
import time
import tracemalloc
from collections.abc import Callable
from hashlib import sha256
from statistics import median

from kvlayer.bench.measure import Row
from kvlayer.identity.keys import PUBLIC_ZONE, ObjectKey, Part
from kvlayer.tier.planner.directory import Directory

__all__ = ["directory_rows"]

_NAMESPACE = "ab" * 32
_PART = Part(0, (0, 1), (0, 1))
_CHUNK = 256


async def directory_rows(rounds: int, *, known: int = 100_000) -> list[Row]:
    """``directory.bytes``: bytes an object. ``directory.stop``: seconds of a full collection.

    The ceiling of the first is a dict from hash to number, the least that finds anything; that of
    the second is a full garbage collection before the directory knew any of its ``known`` objects.
    """
    bare = _traced(lambda: {_hash(n): n for n in range(known)})
    directory = Directory([_PART])
    before = _collection(rounds)

    def fill() -> Directory:
        for number in range(known):
            key = ObjectKey.of(_NAMESPACE, PUBLIC_ZONE, _hash(number), _CHUNK, _PART)
            directory.note(key, 1)
        return directory

    nbytes = _traced(fill)
    return [
        Row("directory.bytes", nbytes / known, "B", bare / known),
        Row("directory.stop", _collection(rounds), "s", before),
    ]


def _hash(number: int) -> bytes:
    return sha256(b"%d" % number).digest()


def _traced(make: Callable[[], object]) -> int:
    """Bytes that what ``make`` returns takes."""
    tracemalloc.start()
    try:
        made = make()
        gc.collect()
        nbytes, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    del made
    return nbytes


def _collection(rounds: int) -> float:
    samples: list[float] = []
    for _ in range(max(rounds, 3)):
        started = time.perf_counter()
        gc.collect()
        samples.append(time.perf_counter() - started)
    return median(samples)
