"""Single objects as files: every blocking call the backend makes on one. Runs on threads.

Errors leave as values, because a traceback would keep the lent buffers of its frames alive.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

from kvlayer.abc.backend import (
    DeleteResult,
    Hit,
    Miss,
    Read,
    ReadResult,
    SizeResult,
    Write,
    contradicts_header,
    stands_for,
)
from kvlayer.errors import BackendError
from kvlayer.identity.keys import ObjectKey, ObjectName
from kvlayer.payload import ALIGNMENT
from kvlayer_backends.file import descriptions, disk
from kvlayer_backends.file.directio import O_DIRECT, drain, fill, suits_direct
from kvlayer_backends.file.faults import explain
from kvlayer_backends.file.paths import Paths
from kvlayer_backends.file.pulse import Pulse
from kvlayer_backends.file.scratch import Scratch
from kvlayer_backends.file.victims import Eviction, Victim

__all__ = ["ObjectFiles", "Outcome"]

P = ParamSpec("P")
T = TypeVar("T")

_log = logging.getLogger(__name__)

_NO_HARD_LINKS = frozenset({errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK})


@dataclass(slots=True)
class Outcome:
    """What a write did. The thread fills it, so that a cancelled wait loses nothing."""

    replaces: bool = False
    """What is there is known to be damaged."""
    created: bool = False
    found: tuple[int, int] | None = None
    """Size and last use (ns) of the object that was there already: nothing was written."""
    error: BackendError | None = None


class ObjectFiles:
    """The object files of one directory. ``direct`` is settled when the backend opens.

    What is no file of this user is no object. Nor is one whose length contradicts its own header,
    nor one without the header that is about to be written there: such a one is replaced.
    """

    def __init__(self, paths: Paths, scratch: Scratch, pulse: Pulse, *, fsync: bool) -> None:
        self._paths = paths
        self._scratch = scratch
        self._pulse = pulse
        self.fsync = fsync
        self.direct = False
        self.descriptions: dict[str, bytes] = {}
        """What namespaces stand for: written beside the first of their objects."""

    def change(self, work: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Do what changes the disk, once it takes changes. Raises ``OSError``."""
        self._pulse.check()
        return work(*args, **kwargs)

    def read(self, read: Read, used_ns: int | None) -> ReadResult:
        """Fill the regions; a hit's file gets the time of use unless that is None."""
        try:
            path = self._paths.object(read.key)
        except ValueError:
            return Miss()
        direct = self.direct and suits_direct(read.regions, read.offset)
        try:
            opened = self._open(path, direct=direct)
            if opened is None:
                return Miss()
            try:
                nbytes = fill(opened, read.regions, read.offset)
                if used_ns is not None:
                    with suppress(OSError):  # no error of the read: it counts as unused
                        self._pulse.check()
                        disk.check_way(path)
                        disk.stamp(opened, used_ns)
                if read.landed is not None:
                    read.landed(nbytes)
                return Hit(nbytes, disk.identity(opened))
            finally:
                os.close(opened)
        except OSError as exc:
            return explain(exc, "read", path)

    @staticmethod
    def _open(path: str, *, direct: bool) -> int | None:
        try:
            opened = disk.open_object(path, O_DIRECT if direct else 0)
        except OSError as exc:
            if not direct or exc.errno != errno.EINVAL:
                raise
            opened = disk.open_object(path)
        return None if opened is None else opened[0]

    def write(self, write: Write, used_ns: int, outcome: Outcome) -> None:
        """Make the whole object appear, unless it is there already. Leaves nothing half-done."""
        try:
            path = self._paths.object(ObjectName.parse(write.key))
        except ValueError as exc:
            outcome.error = BackendError(f"file://: {exc}", hint="name objects with ObjectName")
            return
        try:
            outcome.found = None if outcome.replaces else self._found(path, write)
            if outcome.found is not None:
                return
            self._pulse.check()
            try:
                self._write(path, write, used_ns, outcome)
            except FileNotFoundError:  # our private directory was deleted
                self._scratch.open()
                self._write(path, write, used_ns, outcome)
        except OSError as exc:
            outcome.error = explain(exc, "write", path)

    def _write(self, path: str, write: Write, used_ns: int, outcome: Outcome) -> None:
        temporary = self._scratch.file()
        direct = O_DIRECT if self.direct and suits_direct(write.regions) else 0
        try:
            fd = disk.create(temporary, direct)
            try:
                drain(fd, write.regions)
                disk.note_parent(fd, write.parent)
                disk.stamp(fd, used_ns)
                if self.fsync:
                    os.fsync(fd)
            finally:
                os.close(fd)
            outcome.created = self._publish(temporary, path)
            if not outcome.created:
                outcome.found = None if outcome.replaces else self._found(path, write)
                if outcome.found is None:  # what has the name is not the object
                    disk.replace(temporary, path)
                    outcome.created = True
        finally:
            disk.remove(temporary)
        if self.fsync:
            disk.sync_folder(_folder(path))

    def _publish(self, temporary: str, path: str) -> bool:
        """Give the finished file its name; False when something else has it.

        Raises ``UntrustedError`` where a folder on the way is a link, or another user's.
        """
        folder = _folder(path)
        try:
            disk.check_way(path)  # or it would be written wherever a link leads
            return _link(temporary, path)
        except FileNotFoundError:
            self._paths.make(folder)
            if self.fsync:  # the new folders are names in their parents
                disk.sync_folder(_folder(folder))
                disk.sync_folder(self._paths.folder)
            self.describe(_folder(folder).rpartition("/")[2])
            return _link(temporary, path)

    def describe(self, namespace: str) -> None:
        """Write what a namespace stands for, where that is known. Failing costs nothing."""
        canonical = self.descriptions.get(namespace)
        if canonical is None:
            return
        try:
            self._pulse.check()
            descriptions.write(self._paths, self._scratch.file(), namespace, canonical)
        except OSError as exc:
            _log.debug("file:// cannot describe namespace %s: %s", namespace, exc)

    def present(self, writes: Iterable[Write]) -> list[tuple[int, int] | None]:
        """Size and last use (ns) of each object; None also for one that cannot be looked at."""
        found: list[tuple[int, int] | None] = []
        for write in writes:
            try:
                found.append(self._found(self._paths.object(write.key), write))
            except (OSError, ValueError):  # the write itself will say what is wrong
                found.append(None)
        return found

    @staticmethod
    def _found(path: str, write: Write) -> tuple[int, int] | None:
        """Size and last use of an object. Of what a power failure leaves only the size is right."""
        status = disk.look_at_object(path)
        if status is None:
            return None
        header = disk.read_note(path, ALIGNMENT)
        if header is None or contradicts_header(header, status.st_size):
            return None
        if write.regions and not stands_for(header, write.regions[0]):
            return None
        return status.st_size, disk.used_ns(status)

    def sizes(self, keys: Iterable[ObjectKey]) -> list[SizeResult]:
        """Size of each object, None where there is none, or the error that hides it."""
        return [self._size(key) for key in keys]

    def _size(self, key: ObjectKey) -> SizeResult:
        try:
            path = self._paths.object(key)
        except ValueError:
            return None
        try:
            status = disk.look_at_object(path)
        except OSError as exc:
            return explain(exc, "look at", path)
        return None if status is None else status.st_size

    def use(self, keys: Iterable[ObjectKey], stamps: Iterable[int]) -> None:
        """Give files their time of use. Those that are missing or resist are passed over."""
        with suppress(OSError):
            self._pulse.check()
            for key, used_ns in zip(keys, stamps, strict=True):
                with suppress(OSError, ValueError):
                    path = self._paths.object(key)
                    disk.check_way(path)
                    disk.stamp(path, used_ns)

    def delete(self, keys: Iterable[ObjectKey], gone: list[ObjectKey]) -> list[DeleteResult]:
        """Remove files, noting in ``gone`` those that are not there any more; an error per key.

        Where a folder on the way is a link, or another user's, nothing is removed.
        """
        errors: list[DeleteResult] = []
        for key in keys:
            error = None
            try:
                path = self._paths.object(key)
            except ValueError:  # no object can have it
                errors.append(None)
                continue
            try:
                self._pulse.check()
                if disk.has_way(path):
                    disk.remove(path)
                gone.append(key)
            except OSError as exc:
                error = explain(exc, "delete", path)
            errors.append(error)
        return errors

    def evict(self, victims: Sequence[Victim], nbytes: int, eviction: Eviction) -> None:
        """Remove victims in order until ``nbytes`` are free, sparing what others have used since.

        A victim whose ``used_ns`` is negative is not spared. One that lies behind a link, or in
        another user's folder, is none of ours any more: as a scan sees it, it is lost.
        """
        for victim in victims:
            if eviction.freed_nbytes >= nbytes:
                return
            if eviction.keeps(victim):
                continue
            path = self._paths.object(victim.key)
            try:
                self._pulse.check()
                status = self._victim(path)
                if status is None:
                    eviction.lose(victim)
                elif 0 <= victim.used_ns < disk.used_ns(status):
                    eviction.spare(victim, disk.used_ns(status))
                elif disk.remove(path):
                    eviction.go(victim)
                else:
                    eviction.lose(victim)
            except OSError as exc:
                eviction.fail(victim)
                eviction.error = explain(exc, "evict", path)

    @staticmethod
    def _victim(path: str) -> os.stat_result | None:
        try:
            return disk.look(path) if disk.has_way(path) else None
        except disk.UntrustedError:
            return None


def _link(temporary: str, path: str) -> bool:
    """Name a file without replacing another: what ``rename`` alone cannot promise."""
    try:
        disk.link(temporary, path)
    except FileExistsError:
        return False
    except OSError as exc:
        if exc.errno not in _NO_HARD_LINKS:
            raise
        if disk.exists(path):
            return False
        disk.move(temporary, path)
    return True


def _folder(path: str) -> str:
    return path.rpartition("/")[0]
