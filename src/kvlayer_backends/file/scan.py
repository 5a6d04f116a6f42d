"""Finding objects on disk, cheaply when little has changed. Blocking; runs on a thread."""

from __future__ import annotations

import time
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from kvlayer.abc.backend import Listed, parent_of
from kvlayer.identity.keys import ObjectKey
from kvlayer.payload import ALIGNMENT
from kvlayer_backends.file import disk
from kvlayer_backends.file.paths import Paths, Shard

__all__ = ["Found", "Listing", "Part", "Scan", "Visit"]

_UNSETTLED_NS = 2_000_000_000
"""A directory this fresh when it was read may have changed again within one tick of its mtime."""


class Found(NamedTuple):
    """An object that was not known."""

    key: ObjectKey
    nbytes: int
    used_ns: int
    parent: bytes
    """The end hash of what comes right before it; empty where nobody said."""


class Visit(NamedTuple):
    """What a shard directory's mtime was when it was last read, and when that was."""

    mtime_ns: int
    at_ns: int

    def is_current(self, mtime_ns: int) -> bool:
        """Whether nothing can have been added or removed since."""
        return mtime_ns == self.mtime_ns and mtime_ns < self.at_ns - _UNSETTLED_NS


@dataclass(slots=True)
class Part:
    """What some shards held when they were read."""

    read: dict[Shard, set[str]] = field(default_factory=dict[Shard, set[str]])
    """The keys in each shard that was read."""
    new: list[Found] = field(default_factory=list[Found])
    """Unknown objects, least recently used first."""


class _Shards:
    """The shards of a directory, namespace by namespace. What cannot be read is remembered."""

    def __init__(self, paths: Paths, prefix: str = "") -> None:
        self._paths = paths
        self._prefix = prefix
        self.namespaces: set[str] = set()
        """Those that exist."""
        self.hidden: set[str] = set()
        """Those of them that could not be listed: of their shards nothing is known."""
        self.error: OSError | None = None
        """The first that something could not be read for."""

    def __iter__(self) -> Iterator[Shard]:
        """Raises ``OSError`` when the directory itself cannot be read."""
        names = disk.list_folder(self._paths.folder) or ()
        for namespace in sorted(filter(self._paths.is_namespace, names)):
            if not namespace.startswith(self._prefix[:64]):
                continue
            self.namespaces.add(namespace)
            yield from self._of(namespace)

    def _of(self, namespace: str) -> Iterable[Shard]:
        path = f"{self._paths.folder}/{namespace}"
        try:
            if disk.look_at_folder(path) is None:
                return ()
            names = disk.list_folder(path) or ()
        except OSError as exc:
            self.hidden.add(namespace)
            self.failed(exc)
            return ()
        return [Shard(namespace, name) for name in filter(self._paths.is_shard, names)]

    def failed(self, exc: OSError) -> None:
        if self.error is None:
            self.error = OSError(exc.errno, exc.strerror, exc.filename)  # without its frames


class Scan:
    """One pass over the directory, a few shards at a time. Blocking calls.

    Only shards that changed since ``visits`` are read, and known objects are not looked at again:
    that makes a pass cheap. A shard that cannot be read keeps what is known of it, and is read
    again by the next pass.
    """

    def __init__(self, paths: Paths, known: Container[str], visits: Mapping[Shard, Visit]) -> None:
        self._paths = paths
        self._known = known
        self._before = visits
        self._shards = _Shards(paths)
        self._left = iter(self._shards)
        self._is_done = False
        self.visits: dict[Shard, Visit] = {}
        """Every shard that exists and was read in full: pass it to the next scan."""
        self._kept: set[Shard] = set()
        """Shards that could not be read."""

    @property
    def error(self) -> OSError | None:
        """Why something could not be read, if anything."""
        return self._shards.error

    @property
    def namespaces(self) -> set[str]:
        """The namespaces' folders that exist, once the pass is over."""
        return self._shards.namespaces

    @property
    def hidden(self) -> set[str]:
        """Namespaces of which not everything could be read."""
        return self._shards.hidden | {shard.namespace for shard in self._kept}

    def may_exist(self, shard: Shard) -> bool:
        """Once the pass is over: whether the shard was there, or could not be seen."""
        is_hidden = shard in self._kept or shard.namespace in self._shards.hidden
        return is_hidden or shard in self.visits

    def more(self, count: int) -> Part | None:
        """Read shards until ``count`` objects were seen; None when all have been read.

        Raises ``OSError`` when the directory itself cannot be read: then nothing is known.
        """
        if self._is_done:
            return None
        part, seen = Part(), 0
        for shard in self._left:
            seen += 1 + self._visit(shard, part)
            if seen >= count:
                break
        else:
            self._is_done = True
        part.new.sort(key=lambda found: found.used_ns)
        return part

    def _visit(self, shard: Shard, part: Part) -> int:
        try:
            status = disk.look_at_folder(self._paths.shard(shard))  # before reading it
            if status is None:
                return 0  # gone meanwhile, or no folder of ours
            before = self._before.get(shard)
            if before is not None and before.is_current(status.st_mtime_ns):
                self.visits[shard] = before
                return 0
            visit = Visit(status.st_mtime_ns, time.time_ns())
            present = self._read(shard, part.new)
        except OSError as exc:
            self._shards.failed(exc)
            self._kept.add(shard)
            return 0
        part.read[shard] = present
        self.visits[shard] = visit
        return len(present)

    def _read(self, shard: Shard, new: list[Found]) -> set[str]:
        folder, present, found = self._paths.shard(shard), set[str](), list[Found]()
        for name in disk.list_folder(folder) or ():
            text = self._paths.text(shard, name)
            if text is None:
                continue
            if text in self._known:
                present.add(text)
            elif (key := self._paths.key(shard, name)) is not None:
                status = disk.look_at_object(f"{folder}/{name}")
                if status is not None:
                    present.add(key)
                    parent = _parent(f"{folder}/{name}")
                    found.append(Found(key, status.st_size, disk.used_ns(status), parent))
        new += found
        return present


def _parent(path: str) -> bytes:
    """What comes right before an object: as noted beside it, else as its own header says."""
    noted = disk.parent(path)
    if noted is not None:
        return noted
    try:
        return parent_of(disk.read_note(path, ALIGNMENT) or b"")
    except OSError:
        return b""  # it is counted all the same: see disk.parent


class Listing:
    """What is on disk as a list is drawn from it, a few shards at a time. Blocking calls."""

    def __init__(self, paths: Paths, prefix: str) -> None:
        self._paths = paths
        self._prefix = prefix
        self._shards = _Shards(paths, prefix)
        self._left = iter(self._shards)
        self._is_done = False

    def more(self, count: int) -> list[Listed] | None:
        """The objects of the next shards, ``count`` or a few more; None when all are listed.

        Raises ``OSError`` when the directory cannot be read, and when something in it could not be
        once all that could is listed.
        """
        if self._is_done:
            if self._shards.error is not None:
                raise self._shards.error
            return None
        listed: list[Listed] = []
        for shard in self._left:
            try:
                listed += self._of(shard)
            except OSError as exc:
                self._shards.failed(exc)
            if len(listed) >= count:
                return listed
        self._is_done = True
        return listed

    def _of(self, shard: Shard) -> Iterator[Listed]:
        folder = self._paths.shard(shard)
        if disk.look_at_folder(folder) is None:
            return
        for name in disk.list_folder(folder) or ():
            key = self._paths.key(shard, name)
            if key is not None and key.startswith(self._prefix):
                status = disk.look_at_object(f"{folder}/{name}")
                if status is not None:
                    yield Listed(key, status.st_size, status.st_mtime_ns / 1e9)
