"""Damaged objects, taken out of sight: the newest few stay as evidence, each with a note."""

# Strings and os calls: pathlib costs several times more, on thousands of paths a second.
# ruff: noqa: PTH104, PTH108, PTH116, PTH208

from __future__ import annotations

import errno
import json
import logging
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import NamedTuple

import aiofiles

from kvlayer._offload import Offload
from kvlayer.abc.backend import Damaged, Version
from kvlayer.keys import ObjectKey
from kvlayer_backends.file.objects import version_of
from kvlayer_backends.file.paths import Paths

__all__ = ["KEPT", "Quarantine", "keep"]

_log = logging.getLogger(__name__)

KEPT = 16
"""How many damaged objects a directory keeps."""
_NOTE = ".json"


class _Aside(NamedTuple):
    """A damaged object's new place."""

    key: ObjectKey
    path: str
    nbytes: int


class Quarantine:
    """What one process does with damaged objects. ``pool`` runs what blocks."""

    def __init__(self, paths: Paths) -> None:
        self._paths = paths
        self._notes: ThreadPoolExecutor | None = None
        self.hidden: set[ObjectKey] = set()
        """Damaged objects still in their place: being moved, or neither movable nor deletable."""

    async def take(self, items: Sequence[Damaged], pool: Offload) -> set[ObjectKey]:
        """Move or delete objects; the keys that are gone. The rest is hidden. Never raises.

        An object that was written anew since it was read stays, and is neither.
        """
        self.hidden.update(item.key for item in items)
        gone: set[ObjectKey] = set()
        healthy: set[ObjectKey] = set()
        for aside in await pool.run(self._isolate, items, gone, healthy):
            try:
                await self._note(aside)
            except OSError as exc:
                _log.debug("file:// cannot note why %s is in quarantine: %s", aside.path, exc)
        self.hidden -= gone | healthy
        return gone

    def _isolate(
        self, items: Sequence[Damaged], gone: set[ObjectKey], healthy: set[ObjectKey]
    ) -> list[_Aside]:
        asides: list[_Aside] = []
        for key, version in items:
            try:
                if version is not None and _is_another(self._paths, key, version):
                    healthy.add(key)
                    continue
                aside = _isolate(self._paths, key)
            except (OSError, ValueError) as exc:
                _log.warning("file:// cannot quarantine %s, so it is hidden: %s", key, exc)
            else:
                gone.add(key)
                if aside is not None:
                    asides.append(aside)
        return asides

    async def _note(self, aside: _Aside) -> None:
        if self._notes is None:
            self._notes = ThreadPoolExecutor(1, thread_name_prefix="kvlayer-file-notes")
        facts = {
            "key": aside.key,
            "nbytes": aside.nbytes,
            "quarantined": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "pid": os.getpid(),
            "host": os.uname().nodename,
        }
        async with aiofiles.open(aside.path + _NOTE, "w", executor=self._notes) as file:
            await file.write(json.dumps(facts, indent=1) + "\n")

    def close(self) -> None:
        """End the thread. Idempotent. Blocks."""
        if self._notes is not None:
            self._notes.shutdown()
            self._notes = None


def _is_another(paths: Paths, key: ObjectKey, version: Version) -> bool:
    """Whether other bytes lie there than those that were read."""
    try:
        return version_of(os.stat(paths.object(key))) != version
    except FileNotFoundError:
        return False


def _isolate(paths: Paths, key: ObjectKey) -> _Aside | None:
    """Move an object aside; None when nothing is left to show.

    Evidence that cannot be moved is deleted. Raises ``OSError`` when that fails too.
    """
    source = paths.object(key)
    # Milliseconds first: names sort by age, and key plus clock stay under the 255 bytes of a name.
    target = f"{paths.quarantine}/{time.time_ns() // 1_000_000:013d}.{key.replace('/', '.')}"
    try:
        try:
            os.rename(source, target)
        except FileNotFoundError:
            paths.make(paths.quarantine)
            os.rename(source, target)
        return _Aside(key, target, os.stat(target).st_size)
    except FileNotFoundError:
        return None
    except OSError as exc:
        if exc.errno in (errno.EMFILE, errno.ENFILE):
            raise
        with suppress(FileNotFoundError):
            os.unlink(source)
        return None


def keep(paths: Paths, count: int = KEPT) -> int:
    """Delete all but the newest ``count`` damaged objects; the bytes of those that stay.

    Blocking. What another user keeps there is neither deleted nor counted.
    """
    try:
        names = sorted(os.listdir(paths.quarantine))
    except OSError:
        return 0
    objects = [name for name in names if not name.endswith(_NOTE)]
    left = 0
    for position, name in enumerate(reversed(objects)):
        path = f"{paths.quarantine}/{name}"
        with suppress(OSError):
            if position >= count:
                with suppress(FileNotFoundError):
                    os.unlink(path + _NOTE)
                os.unlink(path)
            else:
                left += os.stat(path).st_size
    return left
