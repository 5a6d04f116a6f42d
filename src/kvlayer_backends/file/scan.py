"""Finding objects on disk, cheaply when little has changed. Blocking; runs on a thread."""

# Strings and os calls: pathlib costs several times more, on thousands of paths a second.
# ruff: noqa: PTH116, PTH208

from __future__ import annotations

import os
import stat
import time
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from kvlayer.abc.backend import Listed
from kvlayer.keys import ObjectKey
from kvlayer_backends.file.paths import Paths, Shard

__all__ = ["Found", "Listing", "Scan", "Visit", "scan", "shards"]

_UNSETTLED_NS = 2_000_000_000
"""A directory this fresh when it was read may have changed again within one tick of its mtime."""


class Found(NamedTuple):
    """An object that was not known."""

    key: ObjectKey
    nbytes: int
    used_ns: int


class Visit(NamedTuple):
    """What a shard directory's mtime was when it was last read, and when that was."""

    mtime_ns: int
    at_ns: int

    def is_current(self, mtime_ns: int) -> bool:
        """Whether nothing can have been added or removed since."""
        return mtime_ns == self.mtime_ns and mtime_ns < self.at_ns - _UNSETTLED_NS


@dataclass(slots=True)
class Scan:
    """What one pass over the directory saw."""

    visits: dict[Shard, Visit] = field(default_factory=dict[Shard, Visit])
    """Every shard that exists: pass it to the next scan."""
    read: dict[Shard, set[str]] = field(default_factory=dict[Shard, set[str]])
    """The keys in each shard that was read again; a shard that is gone reads as empty."""
    new: list[Found] = field(default_factory=list[Found])
    """Unknown objects, least recently used first."""
    complete: bool = True
    """False when ``stop`` ended it early: nothing may be concluded from it."""


def shards(paths: Paths, prefix: str = "") -> Iterator[Shard]:
    """Shards that exist and may hold keys starting with ``prefix``. Unreadable ones are left out.

    Raises ``OSError`` when the directory itself exists and cannot be read.
    """
    try:
        namespaces = sorted(filter(paths.is_namespace, os.listdir(paths.folder)))
    except FileNotFoundError:
        return
    for namespace in namespaces:
        if namespace.startswith(prefix[:64]):
            for name in filter(paths.is_shard, _names(f"{paths.folder}/{namespace}")):
                yield Shard(namespace, name)


def scan(
    paths: Paths,
    known: Container[str],
    visits: Mapping[Shard, Visit],
    stop: Callable[[], bool],
) -> Scan:
    """Read the shards that changed since ``visits`` and find the objects not in ``known``.

    Known objects are not looked at again, which is what makes a pass cheap.
    """
    found = Scan()
    for shard in shards(paths):
        if stop():
            found.complete = False
            return found
        try:
            mtime_ns = os.stat(paths.shard(shard)).st_mtime_ns  # before reading: late is unsettled
        except OSError:
            continue
        before = visits.get(shard)
        if before is not None and before.is_current(mtime_ns):
            found.visits[shard] = before
            continue
        found.visits[shard] = Visit(mtime_ns, time.time_ns())
        found.read[shard] = _read(paths, shard, known, found.new)
    for shard in visits.keys() - found.visits.keys():
        found.read[shard] = set()
    found.new.sort(key=lambda f: f.used_ns)
    return found


def _read(paths: Paths, shard: Shard, known: Container[str], new: list[Found]) -> set[str]:
    present: set[str] = set()
    for name in _names(paths.shard(shard)):
        text = paths.text(shard, name)
        if text is None:
            continue
        if text in known:
            present.add(text)
        elif (key := paths.key(shard, name)) is not None:
            status = _object(f"{paths.shard(shard)}/{name}")
            if status is not None:
                present.add(key)
                new.append(Found(key, status.st_size, status.st_mtime_ns))
    return present


class Listing:
    """What is on disk as a list is drawn from it, a few shards at a time. Blocking calls."""

    def __init__(self, paths: Paths, prefix: str) -> None:
        """Raises ``OSError`` when the directory exists and cannot be read."""
        self._paths = paths
        self._prefix = prefix
        self._left = [*shards(paths, prefix)]

    def more(self, count: int) -> list[Listed] | None:
        """The objects of the next shards, ``count`` or a few more; None when all are listed."""
        if not self._left:
            return None
        listed: list[Listed] = []
        while self._left and len(listed) < count:
            shard = self._left.pop()
            for name in _names(self._paths.shard(shard)):
                key = self._paths.key(shard, name)
                if key is not None and key.startswith(self._prefix):
                    status = _object(f"{self._paths.shard(shard)}/{name}")
                    if status is not None:
                        listed.append(Listed(key, status.st_size, status.st_mtime_ns / 1e9))
        return listed


def _names(directory: str) -> list[str]:
    try:
        return os.listdir(directory)
    except OSError:
        return []


def _object(path: str) -> os.stat_result | None:
    try:
        status = os.lstat(path)
    except OSError:
        return None
    return status if stat.S_ISREG(status.st_mode) else None
