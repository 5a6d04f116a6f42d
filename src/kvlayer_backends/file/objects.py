"""Single objects as files: every blocking call the backend makes on one. Runs on threads.

Errors leave as values, because a traceback would keep the lent buffers of its frames alive.
"""

# Strings and os calls: pathlib costs several times more, on thousands of paths a second.
# ruff: noqa: PTH104, PTH108, PTH116, PTH120

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from kvlayer.abc.backend import (
    DeleteResult,
    Hit,
    Miss,
    Read,
    ReadResult,
    SizeResult,
    Version,
    Write,
    contradicts_header,
)
from kvlayer.errors import BackendError
from kvlayer.keys import ObjectKey
from kvlayer.payload import ALIGNMENT
from kvlayer_backends.file.directio import O_DIRECT, drain, fill, suits_direct
from kvlayer_backends.file.faults import explain, is_absent
from kvlayer_backends.file.ledger import Eviction, Victim
from kvlayer_backends.file.paths import Paths
from kvlayer_backends.file.scratch import Scratch

__all__ = ["ObjectFiles", "Outcome", "version_of"]

_NO_HARD_LINKS = frozenset({errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK})


@dataclass(slots=True)
class Outcome:
    """What a write did. The thread fills it, so that a cancelled wait loses nothing."""

    created: bool = False
    found: tuple[int, int] | None = None
    """Size and last use (ns) of the object that was there already: nothing was written."""
    error: BackendError | None = None


class ObjectFiles:
    """The object files of one directory. ``direct`` is settled when the backend opens."""

    def __init__(self, paths: Paths, scratch: Scratch, *, fsync: bool) -> None:
        self._paths = paths
        self._scratch = scratch
        self._fsync = fsync
        self.direct = False

    def read(self, read: Read, used_ns: int | None) -> ReadResult:
        """Fill the regions; a hit's file gets the time of use unless that is None."""
        try:
            path = self._paths.object(read.key)
        except ValueError:
            return Miss()
        direct = self.direct and suits_direct(read.regions, read.offset)
        try:
            fd = self._open(path, direct=direct)
            try:
                if not stat.S_ISREG(os.fstat(fd).st_mode):
                    return Miss()
                nbytes = fill(fd, read.regions, read.offset)
                if used_ns is not None:
                    with suppress(OSError):  # another user's file: it counts as unused
                        os.utime(fd, ns=(used_ns, used_ns))
                if read.landed is not None:
                    read.landed(nbytes)
                return Hit(nbytes, version_of(os.fstat(fd)))
            finally:
                os.close(fd)
        except OSError as exc:
            return Miss() if is_absent(exc) else explain(exc, "read", path)

    @staticmethod
    def _open(path: str, *, direct: bool) -> int:
        try:
            return os.open(path, os.O_RDONLY | (O_DIRECT if direct else 0))
        except OSError as exc:
            if not direct or exc.errno != errno.EINVAL:
                raise
            return os.open(path, os.O_RDONLY)

    def write(self, write: Write, used_ns: int, outcome: Outcome) -> None:
        """Make the whole object appear, unless it is there already. Leaves nothing half-done."""
        try:
            path = self._paths.object(ObjectKey.parse(write.key))
        except ValueError as exc:
            outcome.error = BackendError(f"file://: {exc}", hint="build keys with ObjectKey.of")
            return
        try:
            (found,) = self.present([write.key])
            replaces = found is not None and found[0] != write.nbytes and _is_no_object(path)
            if found is not None and not replaces:
                outcome.found = found
                return
            try:
                self._write(path, write.regions, used_ns, outcome, replaces=replaces)
            except FileNotFoundError:  # our private directory was deleted
                self._scratch.open()
                self._write(path, write.regions, used_ns, outcome, replaces=replaces)
        except OSError as exc:
            outcome.error = explain(exc, "write", path)

    def _write(
        self,
        path: str,
        regions: Sequence[memoryview],
        used_ns: int,
        outcome: Outcome,
        *,
        replaces: bool,
    ) -> None:
        temporary = self._scratch.file()
        direct = O_DIRECT if self.direct and suits_direct(regions) else 0
        try:
            fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | direct, 0o666)
            try:
                drain(fd, regions)
                os.utime(fd, ns=(used_ns, used_ns))
                if self._fsync:
                    os.fsync(fd)
            finally:
                os.close(fd)
            if replaces:
                os.rename(temporary, path)
                outcome.created = True
            else:
                outcome.created = self._publish(temporary, path)
        finally:
            with suppress(FileNotFoundError):
                os.unlink(temporary)
        if self._fsync:
            _fsync_directory(os.path.dirname(path))

    def _publish(self, temporary: str, path: str) -> bool:
        """Give the finished file its name; False when another writer was first."""
        try:
            return _link(temporary, path)
        except FileNotFoundError:
            directory = os.path.dirname(path)
            self._paths.make(directory)
            if self._fsync:  # the new directories are names in their parents
                _fsync_directory(os.path.dirname(directory))
                _fsync_directory(self._paths.folder)
            return _link(temporary, path)

    def present(self, keys: Iterable[ObjectKey]) -> list[tuple[int, int] | None]:
        """Size and last use (ns) of each object; None also for one that cannot be looked at."""
        return [None if isinstance(found, OSError) else found for found in map(self._stat, keys)]

    def sizes(self, keys: Iterable[ObjectKey]) -> list[SizeResult]:
        """Size of each object, or what hides it."""
        found: list[SizeResult] = []
        for key in keys:
            status = self._stat(key)
            if isinstance(status, OSError):
                found.append(explain(status, "look at", self._paths.object(key)))
            else:
                found.append(None if status is None else status[0])
        return found

    def _stat(self, key: ObjectKey) -> tuple[int, int] | OSError | None:
        try:
            status = os.stat(self._paths.object(key))
        except OSError as exc:
            return None if is_absent(exc) else exc
        except ValueError:
            return None
        return (status.st_size, status.st_mtime_ns) if stat.S_ISREG(status.st_mode) else None

    def use(self, keys: Iterable[ObjectKey], stamps: Iterable[int]) -> None:
        """Give files their time of use. Missing files and those of other users are ignored."""
        for key, used_ns in zip(keys, stamps, strict=True):
            with suppress(OSError, ValueError):
                os.utime(self._paths.object(key), ns=(used_ns, used_ns))

    def delete(self, keys: Iterable[ObjectKey], gone: list[ObjectKey]) -> list[DeleteResult]:
        """Remove files, noting in ``gone`` those that are not there any more."""
        results: list[DeleteResult] = []
        for key in keys:
            try:
                path = self._paths.object(key)
            except ValueError:
                results.append(None)  # no object has such a name
                continue
            try:
                os.unlink(path)
            except OSError as exc:
                if not is_absent(exc):
                    results.append(explain(exc, "delete", path))
                    continue
            gone.append(key)
            results.append(None)
        return results

    def evict(self, victims: Sequence[Victim], nbytes: int, eviction: Eviction) -> None:
        """Remove victims in order until ``nbytes`` are free, sparing what others have used since.

        A victim whose ``used_ns`` is negative is not spared.
        """
        for victim in victims:
            if eviction.freed_nbytes >= nbytes:
                return
            path = self._paths.object(victim.key)
            try:
                used_ns = os.stat(path).st_mtime_ns
                if 0 <= victim.used_ns < used_ns:
                    eviction.spared.append((victim, used_ns))
                    continue
                os.unlink(path)
                eviction.gone.append(victim)
            except OSError as exc:
                if is_absent(exc):
                    eviction.lost.append(victim)
                else:
                    eviction.failed.append(victim)
                    eviction.error = explain(exc, "evict", path)


def version_of(status: os.stat_result) -> Version:
    """Tells a file from what had its name before or will: renaming keeps it, writing does not."""
    return (status.st_dev, status.st_ino, status.st_mtime_ns)


def _is_no_object(path: str) -> bool:
    """Whether a file's length contradicts its own header. Raises ``OSError``."""
    try:
        fd = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return True
    try:
        return contradicts_header(os.pread(fd, ALIGNMENT, 0), os.fstat(fd).st_size)
    finally:
        os.close(fd)


def _link(temporary: str, path: str) -> bool:
    """Name a file without replacing another: what ``rename`` alone cannot promise."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    except OSError as exc:
        if exc.errno not in _NO_HARD_LINKS:
            raise
        if os.path.lexists(path):
            return False
        os.rename(temporary, path)
    return True


def _fsync_directory(directory: str) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
