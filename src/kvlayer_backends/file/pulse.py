"""Whether the disk takes changes, found out by a call that cannot hang.

A file system that is frozen (a snapshot, ``fsfreeze``, a suspended device) puts every thread that
changes something to sleep, where no signal reaches it: such a thread cannot be left behind, and its
process cannot end. Reading goes on; and a read moves a file's time of access unless the file system
is frozen. So before something is changed, a small file is read and looked at.
"""

from __future__ import annotations

import errno
import os
import time
from threading import Lock

from kvlayer_backends.file import disk

__all__ = ["Pulse"]

_PATIENCE_SECONDS = 1.0
"""What a snapshot may take before writers are refused instead of held."""
_POLL_SECONDS = 0.02
_MARK_NS = 1_000_000_000  # every file system that keeps times keeps whole seconds
_NO_ATIMES = getattr(os, "ST_NOATIME", 0) | os.ST_RDONLY
"""Mount options with which a read tells nothing."""


class Pulse:
    """A file of this user, whose time of access is set back to 0 after each look.

    Blocking calls, from any thread. Where there is no such file yet, where it cannot be read any
    more, and where times of access are not kept, it finds nothing wrong: only who has seen a read
    move the time sets it back. Network file systems answer reads from memory, and move none.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._lock = Lock()
        self._fd = -1
        self._stalled_at: float | None = None
        self._is_telling = False
        """Whether a read was seen to move the time of access."""

    def begin(self) -> None:
        """Find out whether a read tells, and if so set the time back. Raises ``OSError``.

        Something was changed just now: the disk takes changes.
        """
        with self._lock:
            self._look()
            if self._fd >= 0:
                self._set_back(_MARK_NS)
                os.pread(self._fd, 1, 0)
                self._is_telling = os.fstat(self._fd).st_atime_ns != _MARK_NS
                if self._is_telling:
                    self._set_back()

    def check(self) -> None:
        """Return when the disk takes changes.

        Raises ``OSError`` (``ETIMEDOUT``) when it has taken none for a second.
        """
        with self._lock:
            self._look()
            while self._fd >= 0 and not self._beats():
                now = time.monotonic()
                if self._stalled_at is None:
                    self._stalled_at = now
                if now - self._stalled_at >= _PATIENCE_SECONDS:
                    raise OSError(errno.ETIMEDOUT, "the file system is frozen", self._path)
                time.sleep(_POLL_SECONDS)
            self._stalled_at = None

    def _look(self) -> None:
        if self._fd < 0:
            opened = disk.open_object(self._path)
            if opened is not None:
                self._fd = opened[0]

    def _beats(self) -> bool:
        try:
            os.pread(self._fd, 1, 0)
            if os.fstat(self._fd).st_atime_ns == 0:
                return bool(os.fstatvfs(self._fd).f_flag & _NO_ATIMES)
            if self._is_telling:
                self._set_back()
        except OSError:
            # This disk has died, and another may lie in its place: the change itself finds out.
            self._drop()
        return True

    def _set_back(self, atime_ns: int = 0) -> None:
        os.utime(self._fd, ns=(atime_ns, disk.used_ns(os.fstat(self._fd))))

    def close(self) -> None:
        """Idempotent."""
        with self._lock:
            self._drop()

    def _drop(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)
