"""Damaged objects, taken out of sight: the newest few stay as evidence, each with a note."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from contextlib import suppress

from kvlayer.abc.backend import Damaged, DeleteResult, Version
from kvlayer.identity.keys import ObjectKey
from kvlayer_backends.file import disk
from kvlayer_backends.file.faults import explain
from kvlayer_backends.file.notes import SUFFIX, Aside
from kvlayer_backends.file.paths import Paths

__all__ = ["KEPT", "Quarantine", "keep"]

_log = logging.getLogger(__name__)

KEPT = 16
"""How many damaged objects a directory keeps."""


class Quarantine:
    """What one process does with damaged objects. Blocking calls, from any thread."""

    def __init__(self, paths: Paths) -> None:
        self._paths = paths
        self.hidden: set[ObjectKey] = set()
        """Damaged objects that could be neither moved nor deleted: never offered again."""

    def take(
        self, items: Sequence[Damaged], gone: set[ObjectKey], aside: list[Aside]
    ) -> list[DeleteResult]:
        """Move or delete objects, noting in ``gone`` those that are not there any more.

        In ``aside``, those that were moved.

        One that can be neither moved nor deleted is hidden. One that was written anew since it was
        read stays. The answer is an error where it cannot be seen which of them lies there.
        """
        return [self._take(key, version, gone, aside) for key, version in items]

    def _take(
        self, key: ObjectKey, version: Version, gone: set[ObjectKey], aside: list[Aside]
    ) -> DeleteResult:
        try:
            path = self._paths.object(key)
        except ValueError:
            return None  # no object has such a name
        try:
            if version is not None and not self._is(path, version):
                return None
        except OSError as exc:
            return explain(exc, "look at", path)
        try:
            self._isolate(key, aside)
        except OSError as exc:
            _log.warning("file:// cannot quarantine %s, so it is hidden: %s", key, exc)
            self.hidden.add(key)
        else:
            gone.add(key)
            self.hidden.discard(key)
        return None

    @staticmethod
    def _is(path: str, version: Version) -> bool:
        opened = disk.open_object(path)
        if opened is None:
            return True  # nothing, or no object: to be moved out of the way
        try:
            return disk.identity(opened[0]) == version
        finally:
            os.close(opened[0])

    def _isolate(self, key: ObjectKey, aside: list[Aside]) -> None:
        """Move an object aside. Evidence that cannot be moved is deleted.

        Raises ``OSError`` when that fails too, or where it lies behind a link.
        """
        source = self._paths.object(key)
        if not disk.has_way(source):
            return
        # Milliseconds first: names sort by age. Key and clock stay under the 255 bytes of a name.
        name = f"{time.time_ns() // 1_000_000:013d}.{key.replace('/', '.')}"
        target = f"{self._paths.quarantine}/{name}"
        try:
            self._paths.make(self._paths.quarantine)
            disk.move(source, target)
        except FileNotFoundError:
            return
        except OSError:
            disk.remove(source)
            return
        status = disk.look(target)
        aside.append(Aside(key, target, None if status is None else status.st_size))


def keep(paths: Paths, count: int = KEPT) -> int:
    """Delete all but the newest ``count`` damaged objects; the bytes of those that stay.

    What resists stays and counts. Blocking. Raises ``OSError`` when that cannot be seen, or where
    the folder is a link or another user's: what lies behind it is not ours to delete.
    """
    try:
        disk.check_folder(paths.folder)
        disk.check_folder(paths.quarantine)
    except FileNotFoundError:
        return 0
    names = sorted(disk.list_folder(paths.quarantine) or ())
    objects = [name for name in names if not name.endswith(SUFFIX)]
    for lonely in set(names).difference(objects, (name + SUFFIX for name in objects)):
        with suppress(OSError):
            disk.remove(f"{paths.quarantine}/{lonely}")
    left = 0
    for position, name in enumerate(reversed(objects)):
        path = f"{paths.quarantine}/{name}"
        if position >= count:
            with suppress(OSError):
                disk.remove(path + SUFFIX)
                disk.remove(path)
                continue
        status = disk.look(path)
        left += 0 if status is None else status.st_size
    return left
