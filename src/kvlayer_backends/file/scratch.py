"""Unfinished files: one private directory per process, and how a survivor clears a dead one's."""

from __future__ import annotations

import itertools
import re
import uuid
from contextlib import suppress
from threading import Lock
from typing import NamedTuple

from kvlayer_backends.file import disk
from kvlayer_backends.file.locks import FileLock
from kvlayer_backends.file.paths import Paths

__all__ = ["Reaped", "Scratch", "reap"]

_LOCK = "lock"
_SUFFIX = ".part"
_OWNED = re.compile(r"[0-9a-f]{32}")
_TRIES = 16


class Scratch:
    """A private ``tmp/<uuid>/`` whose lock file stays locked while this process lives.

    Blocking calls, from any thread.
    """

    def __init__(self, paths: Paths) -> None:
        self._paths = paths
        self._guard = Lock()
        self._numbers = itertools.count()
        self._lock: FileLock | None = None

    @property
    def path(self) -> str | None:
        """The directory; None while it is not open."""
        return None if self._lock is None else _directory(self._lock)

    def open(self) -> None:
        """Create the directory, again if it was deleted. Raises ``OSError``."""
        with self._guard:
            self._open()

    def _open(self) -> FileLock:
        if self._lock is not None and not self._lock.held():
            self._close()
        if self._lock is None:
            self._lock = self._create()
        return self._lock

    def _create(self) -> FileLock:
        for _ in range(_TRIES):
            directory = f"{self._paths.tmp}/{uuid.uuid4().hex}"
            self._paths.make(directory)
            lock = FileLock(f"{directory}/{_LOCK}")
            # Until it is locked a janitor may take the directory for a dead process's.
            with suppress(FileNotFoundError):
                if lock.acquire():
                    return lock
        raise FileNotFoundError(2, "private directories vanish as they are made", self._paths.tmp)

    def file(self) -> str:
        """A path for a new unfinished file. The directory may have been deleted meanwhile.

        Raises ``OSError`` where there is no private directory and none can be made: elsewhere
        nobody would ever clear up after this process.
        """
        with self._guard:
            lock = self._lock or self._open()
        return f"{_directory(lock)}/{next(self._numbers)}{_SUFFIX}"

    def close(self) -> None:
        """Remove the directory and unlock it. Idempotent; never raises for files that resist."""
        with self._guard:
            self._close()

    def abandon(self) -> None:
        """Unlock the directory and leave it to a survivor: the disk does not answer. Idempotent."""
        lock, self._lock = self._lock, None
        if lock is not None:
            lock.release()

    def _close(self) -> None:
        lock, self._lock = self._lock, None
        if lock is not None:
            with suppress(OSError):
                _remove(_directory(lock))
            lock.release()


class Reaped(NamedTuple):
    """What dead processes had left."""

    processes: int
    files: int
    """That they had begun."""


def reap(paths: Paths) -> Reaped:
    """Remove the private directories of processes that have died without closing.

    A directory belongs to the dead when its lock can be taken, or made and taken: who has made a
    directory but no lock yet then makes another. Nothing but unfinished files and the lock is ever
    deleted. Blocking. Raises ``OSError`` when it cannot be seen who has left something.
    """
    processes = unfinished = 0
    for name in filter(_OWNED.fullmatch, disk.list_folder(paths.tmp) or ()):
        directory = f"{paths.tmp}/{name}"
        lock = FileLock(f"{directory}/{_LOCK}")
        try:
            if lock.acquire():
                processes += 1
                unfinished += _remove(directory)
        except OSError:
            continue  # gone already, or it resists: the next pass tries again
        finally:
            lock.release()
    return Reaped(processes, unfinished)


def _directory(lock: FileLock) -> str:
    return lock.path.rpartition("/")[0]


def _remove(directory: str) -> int:
    """Delete unfinished files, then the lock, then the directory if nothing else is in it.

    Returns how many unfinished files there were. Raises ``OSError`` for one that resists.
    """
    unfinished: list[str] = []
    with suppress(OSError):  # no descriptor left to read it with: if it is empty it goes
        unfinished += [n for n in disk.list_folder(directory) or () if n.endswith(_SUFFIX)]
    for name in (*unfinished, _LOCK):
        disk.remove(f"{directory}/{name}")
    disk.remove_folder(directory)
    return len(unfinished)
