"""A lock that dies with its process: ``flock`` on a file."""

# Strings and os calls: pathlib costs several times more, on thousands of paths a second.
# ruff: noqa: PTH116

from __future__ import annotations

import fcntl
import os

__all__ = ["FileLock"]


class FileLock:
    """An exclusive lock on ``path``, held until ``release`` or the end of the process.

    Blocking calls, one thread at a time. The file itself is left in place. A forked child that
    does not exec shares the lock and keeps it while it lives.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._fd: int | None = None

    def acquire(self) -> bool:
        """Take the lock without waiting; False when somebody else has it.

        Raises ``OSError`` when the file can neither be opened nor created.
        """
        fd = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            return False
        except OSError:
            os.close(fd)
            raise
        self._fd = fd
        if not self.held():  # its last owner removed the file between our open and our flock
            self.release()
            return False
        return True

    def held(self) -> bool:
        """Whether the lock is ours and still on the file that others see at ``path``."""
        if self._fd is None:
            return False
        try:
            there, ours = os.stat(self.path), os.fstat(self._fd)
        except FileNotFoundError:
            return False
        return (there.st_dev, there.st_ino) == (ours.st_dev, ours.st_ino)

    def release(self) -> None:
        """Idempotent."""
        fd, self._fd = self._fd, None
        if fd is not None:
            os.close(fd)
