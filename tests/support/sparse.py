"""Directories of many objects in no time: files with the right names and sizes, but no bytes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

from kvlayer.identity.keys import ObjectKey, ObjectName, Part
from kvlayer_backends.file.paths import Paths, Shard

__all__ = ["fill", "names"]

_PART = Part(0, (0, 1), (0, 1))
_EARLIEST_NS = 10**18


def names(count: int, *, namespace: str = "5a" * 32, first: int = 0) -> Iterator[ObjectKey]:
    """Keys of ``count`` objects in the public zone, spread over all shards."""
    for number in range(first, first + count):
        yield ObjectName.raw(
            ObjectKey.of(namespace, "0", sha256(b"%d" % number).digest(), 16, _PART)
        )


def fill(
    root: Path, count: int, *, nbytes: int = 8192, namespace: str = "5a" * 32, first: int = 0
) -> None:
    """Lay ``count`` objects of ``nbytes`` into a tier's directory, each used later than the last.

    They are holes: no block of the disk is used for them. Some 20 us each.
    """
    paths = Paths(str(root))
    made: set[Shard] = set()
    for number, key in enumerate(names(count, namespace=namespace, first=first)):
        shard = Shard.of(key)
        if shard not in made:
            paths.make(paths.shard(shard))
            made.add(shard)
        fd = os.open(paths.object(key), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        os.ftruncate(fd, nbytes)
        used_ns = _EARLIEST_NS + number * 1000
        os.utime(fd, ns=(used_ns, used_ns))
        os.close(fd)
