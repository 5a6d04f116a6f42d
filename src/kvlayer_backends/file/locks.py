"""A lock that dies with its process: ``flock`` on a file."""

from __future__ import annotations

import fcntl
import os
from weakref import WeakSet

from kvlayer_backends.file import disk

__all__ = ["FileLock"]

_locks: WeakSet[FileLock] = WeakSet()
_forks = 0
"""Counted before and after each fork: odd while one is under way."""


class FileLock:
    """An exclusive lock on ``path``, held until ``release`` or the end of the process.

    Blocking calls, one thread at a time. The file itself is left in place. A forked child has no
    part in it: it closes its copy of the descriptor at once.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._fd: int | None = None
        _locks.add(self)

    def acquire(self) -> bool:
        """Take the lock without waiting; False when somebody else has it.

        Raises ``OSError`` when the file can neither be opened nor created, or is not this user's.
        """
        forks = _forks
        fd = disk.open_lock(self.path)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            return False
        except OSError:
            os.close(fd)
            raise
        self._fd = fd
        # A child forked meanwhile has a descriptor that nobody told it to close. And the last owner
        # may have removed the file between our open and our flock.
        if forks != _forks or forks % 2 or not self.held():
            self.release()
            return False
        return True

    def held(self) -> bool:
        """Whether the lock is ours and still on the file that others see at ``path``.

        Raises ``OSError`` when that cannot be seen.
        """
        if self._fd is None:
            return False
        there, ours = disk.look(self.path), os.fstat(self._fd)
        return there is not None and (there.st_dev, there.st_ino) == (ours.st_dev, ours.st_ino)

    def note(self, text: bytes) -> None:
        """Leave a word in the file for who has the lock next. Only while held."""
        if self._fd is not None:
            os.pwrite(self._fd, text, 0)
            os.ftruncate(self._fd, len(text))

    def noted(self, nbytes: int) -> bytes:
        """What the last one left there, the first ``nbytes`` of it. Only while held."""
        return b"" if self._fd is None else os.pread(self._fd, nbytes, 0)

    def release(self) -> None:
        """Idempotent."""
        fd, self._fd = self._fd, None
        if fd is not None:
            try:
                fcntl.flock(fd, fcntl.LOCK_UN)  # whoever else has a copy of the descriptor
            finally:
                os.close(fd)

    def leave_to_parent(self) -> None:
        """In a forked child: the lock is on the open file, which lives while any copy is open."""
        fd, self._fd = self._fd, None
        if fd is not None:
            os.close(fd)


def _count_fork() -> None:
    global _forks  # noqa: PLW0603  # forks happen to the whole process
    _forks += 1


def _in_child() -> None:
    for lock in _locks:
        lock.leave_to_parent()
    _count_fork()


os.register_at_fork(before=_count_fork, after_in_parent=_count_fork, after_in_child=_in_child)
