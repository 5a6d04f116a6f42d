"""The janitor's office: a lock on a file, which also holds what its last holder had counted."""

from __future__ import annotations

from kvlayer_backends.file import disk
from kvlayer_backends.file.locks import FileLock

__all__ = ["Office"]

_DIGITS = 20
_MOST_NBYTES = 1 << 62  # whoever noted more noted nonsense


class Office:
    """Held by at most one process of a directory. Blocking calls, one thread at a time."""

    def __init__(self, path: str) -> None:
        self._lock = FileLock(path)
        self._noted: int | None = None

    def take(self) -> int | None:
        """Take office if it is free; None when somebody else has it.

        Returns how many bytes lay in the directory when the last janitor counted them, 0 where
        nobody noted it. Raises ``OSError``, also where the folder it is in is not this user's: who
        is in office removes what lies there.
        """
        disk.check_private(self._lock.path.rpartition("/")[0])
        if not self._lock.acquire():
            return None
        self._noted = None
        try:
            nbytes = int(self._lock.noted(_DIGITS))
        except (OSError, ValueError):
            return 0
        if not 0 <= nbytes < _MOST_NBYTES:
            return 0
        self._noted = nbytes
        return nbytes

    def is_held(self) -> bool:
        """Whether the office is still ours. Raises ``OSError`` when that cannot be seen."""
        return self._lock.held()

    def note(self, nbytes: int) -> None:
        """Leave for the next one how many bytes lie there. Raises ``OSError``."""
        if nbytes != self._noted:
            self._lock.note(b"%d" % nbytes)
            self._noted = nbytes

    def leave(self) -> None:
        """Idempotent."""
        self._lock.release()
