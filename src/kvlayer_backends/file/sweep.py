"""Folders that hold nothing any more, removed. Blocking; runs on a thread."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable

from kvlayer_backends.file import disk
from kvlayer_backends.file.descriptions import NAME
from kvlayer_backends.file.paths import Paths, Shard

__all__ = ["sweep"]

_UNUSED_SECONDS = 3600.0
"""A namespace nothing was ever stored in stays so long: its cache may be about to store."""


def sweep(
    paths: Paths, namespaces: Iterable[str], shards: Collection[Shard], empty: Iterable[Shard]
) -> list[Shard]:
    """Remove shards that are ``empty``, and those of ``namespaces`` that are without ``shards``.

    Returns the shards that were removed. What holds something after all stays: only empty folders
    and descriptions are ever removed, and who is about to write there makes them again. Raises
    ``OSError``.
    """
    removed = [
        shard
        for shard in empty
        if disk.look_at_folder(f"{paths.folder}/{shard.namespace}") is not None
        and disk.remove_folder(paths.shard(shard))
    ]
    gone = set(removed)
    left = {shard.namespace for shard in shards if shard not in gone}
    emptied = {shard.namespace for shard in removed}
    for namespace in namespaces:
        if namespace in left:
            continue
        folder = f"{paths.folder}/{namespace}"
        status = disk.look_at_folder(folder)
        if status is None or not set(disk.list_folder(folder) or ()) <= {NAME}:
            continue
        if namespace in emptied or time.time() - status.st_mtime > _UNUSED_SECONDS:
            disk.remove(f"{folder}/{NAME}")
            disk.remove_folder(folder)
    return removed
