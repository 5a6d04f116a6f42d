"""Remembers the sha256 of large files, so a model is read once and not per start.

A text file, one line per model file. It is believed only where nobody but the user can have written
it. A line that does not check is not there, and a directory that cannot be written is not used.
"""

from __future__ import annotations

import os
import re
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import TypeAlias
from zlib import crc32

from kvlayer._home import cache_directory
from kvlayer.identity.own import is_own, read_own

__all__ = ["DigestCache"]

FileKey: TypeAlias = tuple[int, int, int, int, int]
"""Device, inode, size, mtime and ctime in nanoseconds. Two files may have equal ones."""

_NAME = "weights.sha256"
_MAX_ENTRIES = 4096
_MAX_NBYTES = 1024 * 1024
_LINE = re.compile(r"((?:[0-9]{1,20} ){5}[0-9a-f]{64} [0-9a-f]{64}) ([0-9a-f]{8})")

# Kernels stamp files by a clock of a few ms, some network file systems by one of seconds. A file
# changed twice within one tick keeps its stamps, so one this young, or from the future, is not
# remembered.
_SETTLED_NS = 3_000_000_000


class DigestCache:
    """``stat`` and samples of a file -> its sha256. Reads its own file once, at the first ``get``;
    writes in ``save``.

    ``directory`` None is ``$XDG_CACHE_HOME/kvlayer`` or ``~/.cache/kvlayer``. Never raises
    ``OSError``.
    """

    def __init__(self, directory: str | os.PathLike[str] | None = None) -> None:
        self._directory = cache_directory() if directory is None else Path(directory)
        self._known: dict[FileKey, tuple[str, str]] | None = None
        self._new: dict[FileKey, tuple[str, str]] = {}

    @staticmethod
    def key(status: os.stat_result) -> FileKey:
        """What a file is remembered by."""
        return (
            status.st_dev,
            status.st_ino,
            status.st_size,
            status.st_mtime_ns,
            status.st_ctime_ns,
        )

    def get(self, status: os.stat_result) -> tuple[str, str] | None:
        """Of the file that had this ``stat``: the digest of its samples, and its sha256, in hex.

        The sha256 is that of the file at hand only where the samples are equal.
        """
        if self._known is None:
            self._known = self._load()
        return self._known.get(self.key(status)) if self.is_settled(status) else None

    @staticmethod
    def is_settled(status: os.stat_result) -> bool:
        """Whether a change from now on is sure to show in the ``stat``; ask before reading."""
        return time.time_ns() - status.st_ctime_ns > _SETTLED_NS

    def put(self, status: os.stat_result, samples: str, digest: str) -> None:
        """Remember the sha256 of a settled file with these samples."""
        self._new[self.key(status)] = samples, digest

    def save(self) -> None:
        """Add what is new to the file. Of two writers at once, the last one's lines remain."""
        if not self._new or self._directory is None:
            return
        entries = self._load() | self._new  # read again: another process may have added to it
        lines = [_line(key, *digests) for key, digests in entries.items()][-_MAX_ENTRIES:]
        try:
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not is_own(self._directory):
                return  # whoever else writes there could name another model's digest
            handle, temporary = tempfile.mkstemp(prefix=f".{_NAME}-", dir=self._directory)
        except OSError:
            return  # a read-only home: not remembered, which costs only time
        try:
            with os.fdopen(handle, "w", encoding="ascii") as file:
                file.writelines(lines)
            Path(temporary).replace(self._directory / _NAME)
        except OSError:  # a full disk
            with suppress(OSError):
                Path(temporary).unlink()
        self._known, self._new = entries, {}

    def _load(self) -> dict[FileKey, tuple[str, str]]:
        if self._directory is None:
            return {}
        packed = read_own(self._directory / _NAME, _MAX_NBYTES) or b""
        lines = packed.decode("ascii", errors="replace").splitlines()
        return dict(entry for line in lines if (entry := _entry(line)) is not None)


def _line(key: FileKey, samples: str, digest: str) -> str:
    body = f"{' '.join(map(str, key))} {samples} {digest}"
    return f"{body} {crc32(body.encode()):08x}\n"


def _entry(line: str) -> tuple[FileKey, tuple[str, str]] | None:
    match = _LINE.fullmatch(line)
    if match is None or int(match[2], 16) != crc32(match[1].encode()):
        return None
    *numbers, samples, digest = match[1].split(" ")
    device, inode, size, mtime, ctime = map(int, numbers)
    return (device, inode, size, mtime, ctime), (samples, digest)
