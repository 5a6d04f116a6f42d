"""Unfinished files: one private directory per process, and how a survivor clears a dead one's."""

# Strings and os calls: pathlib costs several times more, on thousands of paths a second.
# ruff: noqa: PTH106, PTH108, PTH120, PTH208

from __future__ import annotations

import itertools
import os
import re
import uuid
from contextlib import suppress
from threading import Lock

from kvlayer_backends.file.locks import FileLock
from kvlayer_backends.file.paths import Paths

__all__ = ["Scratch", "reap"]

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
        return None if self._lock is None else os.path.dirname(self._lock.path)

    def open(self) -> None:
        """Create the directory, again if it was deleted. Raises ``OSError``."""
        with self._guard:
            if self._lock is not None and self._lock.held():
                return
            self._close()
            self._lock = self._create()

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
        """A path for a new unfinished file. The directory may have been deleted meanwhile."""
        return f"{self.path or self._paths.tmp}/{next(self._numbers)}{_SUFFIX}"

    def close(self) -> None:
        """Remove the directory and unlock it. Idempotent; never raises for files that resist."""
        with self._guard:
            self._close()

    def _close(self) -> None:
        lock, self._lock = self._lock, None
        if lock is not None:
            _remove(os.path.dirname(lock.path))
            lock.release()


def reap(paths: Paths) -> int:
    """Remove the private directories of processes that have died; how many. Blocking.

    A directory belongs to the dead when its lock can be taken, or made and taken: who has made a
    directory but no lock yet then makes another. Nothing but unfinished files and the lock is ever
    deleted.
    """
    reaped = 0
    for name in filter(_OWNED.fullmatch, _names(paths.tmp)):
        directory = f"{paths.tmp}/{name}"
        lock = FileLock(f"{directory}/{_LOCK}")
        try:
            if lock.acquire():
                reaped += _remove(directory)
        except OSError:
            continue  # another user's, or gone already
        finally:
            lock.release()
    return reaped


def _remove(directory: str) -> bool:
    """Delete unfinished files, then the lock, then the directory if nothing else is in it."""
    unfinished = [name for name in _names(directory) if name.endswith(_SUFFIX)]
    try:
        for name in (*unfinished, _LOCK):
            with suppress(FileNotFoundError):
                os.unlink(f"{directory}/{name}")
        os.rmdir(directory)
    except OSError:
        return False
    return True


def _names(directory: str) -> list[str]:
    try:
        return os.listdir(directory)
    except OSError:  # gone, or no descriptor left to read it with
        return []
