"""Whether a directory suits a disk tier: tried with small files that are gone afterwards."""

# os.path where pathlib raises for a directory this user may not look into.
# ruff: noqa: PTH112

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import secrets
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from kvlayer.doctor.configured import Place
from kvlayer.doctor.finding import Check, Finding
from kvlayer.doctor.machine import Machine
from kvlayer.doctor.releases import Held, examine_releases, held
from kvlayer.payload import ALIGNMENT
from kvlayer.urls import format_bytes

__all__ = ["direct_io", "examine", "nearest_directory", "silent"]

_DIRECTORY = Check("directory", "a disk tier that cannot use its directory does not open")
_SYSTEM = Check("file-system", "objects should outlive the process, and reads should be local")
_DIRECT = Check(
    "o-direct",
    "without O_DIRECT each byte is copied once more, and the page cache grows at the engine's cost",
)
_LINKS = Check("hard-links", "an object is published by a hard link: the first of two writers wins")
_LOCKS = Check("flock", "of the processes that share a directory one is elected by a lock")
_TIMES = Check("file-times", "a file's time is an object's last use: it decides what is evicted")
_SPACE = Check("space", "on a full disk stores fail")
_INODES = Check("inodes", "each object is a file")

_MEMORY_KINDS = frozenset({"tmpfs", "ramfs"})
_REMOTE_KINDS = frozenset({"nfs", "nfs4", "cifs", "smb3", "9p", "ceph", "lustre", "gpfs", "afs"})
_LAYER_KINDS = frozenset({"overlay", "aufs"})

_SKEW_SECONDS = 2.0  # some file systems keep times to two seconds


def examine(machine: Machine, place: Place, object_nbytes: int) -> Iterator[Finding]:
    """Everything about a directory but its speed. ``object_nbytes``: what a stored chunk takes.

    A directory that does not exist yet is judged by the nearest one above it, and not made. All
    that is written is a folder of a few pages, which is removed again.
    """
    for finding in _examine(machine, place, object_nbytes):
        yield replace(finding, detail={"path": place.path, **finding.detail})


def silent(place: Place, seconds: float) -> Finding:
    """A directory whose disk has not answered for so long."""
    return _DIRECTORY.bad(
        f"{place.path} does not answer: nothing came back for {seconds:g} s",
        "see what the system's log says of that disk or mount; a cache on it serves misses",
        path=place.path,
    )


def _examine(machine: Machine, place: Place, object_nbytes: int) -> Iterator[Finding]:
    at = nearest_directory(place.path)
    missing = _below(at, place.path)
    if missing and (place.readonly or os.path.lexists(missing)):
        what = "is not a directory" if os.path.lexists(missing) else "does not exist"
        yield _DIRECTORY.bad(f"{missing} {what}", "name a directory that can be used")
        return
    where = f"{place.path} (not there yet; tried in {at})" if missing else place.path
    yield _file_system(machine, at)
    if place.readonly:
        yield _readable(place.path)
        return
    try:
        with tempfile.TemporaryDirectory(prefix=".kvlayer-doctor-", dir=at) as scratch:
            tried = [_direct(place, scratch), _links(scratch), _locks(scratch), _times(scratch)]
    except OSError as exc:
        yield _DIRECTORY.bad(
            f"{where} cannot be written: {exc.strerror or exc}",
            "give this user write permission, or name another directory",
            tried=at,
        )
        return
    yield _DIRECTORY.ok(f"{where} can be written", tried=at)
    yield from tried
    found = held(place.path)
    yield _space(machine, place, at, found)
    yield examine_releases(place.path, found)
    yield _inodes(machine, place, at, object_nbytes)


def nearest_directory(path: str) -> str:
    """``path``, or the nearest directory above it that exists and can be looked at."""
    here = Path(path)
    return next(str(each) for each in (here, *here.parents) if os.path.isdir(each))


def _below(at: str, path: str) -> str:
    """What would have to be made first for ``path`` to exist; empty when it does."""
    here = Path(path)
    above = (each for each in (here, *here.parents) if str(each.parent) == at)
    return "" if str(here) == at else str(next(above))


def _readable(path: str) -> Finding:
    try:
        any(Path(path).iterdir())
    except OSError as exc:
        why = exc.strerror or str(exc)
        return _DIRECTORY.bad(f"{path} cannot be read: {why}", "give this user access")
    return _DIRECTORY.ok(f"{path} can be read; a read-only tier writes nothing")


def _file_system(machine: Machine, at: str) -> Finding:
    mount = machine.mount_of(os.path.realpath(at))
    if mount is None:
        return _SYSTEM.unknown(f"nothing says what kind of file system {at} is on")
    detail: dict[str, object] = {"kind": mount.kind, "mount": mount.point}
    found = f"{at} is on {mount.kind}, mounted at {mount.point}"
    if mount.kind in _MEMORY_KINDS:
        return _SYSTEM.warn(
            f"{found}: it is memory",
            "use a disk; for memory a larger cpu:// tier costs less",
            **detail,
        )
    if mount.kind in _LAYER_KINDS:
        return _SYSTEM.warn(
            f"{found}: a container's own layer, which goes with it",
            "mount a volume of a local disk there",
            **detail,
        )
    if mount.kind in _REMOTE_KINDS or mount.kind.startswith("fuse"):
        return _SYSTEM.warn(
            f"{found}: another machine or process answers",
            "use a local disk; locks and times of a network file system may not be what they seem",
            **detail,
        )
    return _SYSTEM.ok(found, **detail)


def direct_io(path: str) -> str:
    """Write and read a page at ``path`` past the page cache; why it cannot be done, or nothing.

    ``path`` must not exist and is left behind. Raises ``OSError`` for anything but a refusal.
    """
    flag = getattr(os, "O_DIRECT", 0)
    if not flag:
        return "this platform has no O_DIRECT"
    with mmap.mmap(-1, ALIGNMENT) as page:  # page-aligned, as O_DIRECT wants
        written = secrets.token_bytes(ALIGNMENT)
        page[:] = written
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | flag, 0o600)
            try:
                os.pwritev(fd, [page], 0)
                page[:] = bytes(ALIGNMENT)
                os.preadv(fd, [page], 0)
            finally:
                os.close(fd)
        except OSError as exc:
            if exc.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                raise
            return exc.strerror or str(exc)
        return "" if page[:] == written else "what was read is not what was written"


def _direct(place: Place, scratch: str) -> Finding:
    refused = direct_io(f"{scratch}/direct")
    detail: dict[str, object] = {"works": not refused, "wanted": place.direct}
    if not refused:
        return _DIRECT.ok("pages can be written and read past the page cache", **detail)
    found = f"files are buffered: {refused}"
    if place.direct == "on":
        return _DIRECT.bad(
            f"direct=on, and {found}", "use direct=auto, or a disk with ext4 or xfs", **detail
        )
    return _DIRECT.warn(found, "use a local disk with ext4 or xfs", **detail)


def _links(scratch: str) -> Finding:
    Path(scratch, "one").write_bytes(b"")
    try:
        Path(scratch, "two").hardlink_to(f"{scratch}/one")
    except OSError as exc:
        return _LINKS.warn(
            f"there are none here ({exc.strerror or exc}): objects are renamed into place",
            "use a local disk; with renaming the last of two writers wins, which costs a write",
        )
    return _LINKS.ok("files can be linked")


def _locks(scratch: str) -> Finding:
    advice = "use a local disk: without locks two processes would both evict"
    first = os.open(f"{scratch}/lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        second = os.open(f"{scratch}/lock", os.O_RDWR)
        try:
            fcntl.flock(first, fcntl.LOCK_EX | fcntl.LOCK_NB)
            fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return _LOCKS.ok("a second lock on a file is refused")
        except OSError as exc:
            return _LOCKS.bad(f"files cannot be locked: {exc.strerror or exc}", advice)
        finally:
            os.close(second)
    finally:
        os.close(first)
    return _LOCKS.bad("a file that is locked can be locked again", advice)


def _times(scratch: str) -> Finding:
    before = time.time()
    Path(scratch, "time").write_bytes(b"")
    skew = Path(scratch, "time").stat().st_mtime - before
    if abs(skew) > _SKEW_SECONDS:
        return _TIMES.warn(
            f"a new file's time is {skew:+.1f} s from this machine's clock",
            "set the clocks of this machine and of the file server by one time source",
            skew_seconds=skew,
        )
    return _TIMES.ok("a new file's time is that of this machine's clock", skew_seconds=skew)


def _space(machine: Machine, place: Place, at: str, found: Held) -> Finding:
    space = machine.space(at)
    if space is None:
        return _SPACE.unknown(f"{at} does not say how much room it has")
    mine, is_all = found.own, found.is_all
    detail: dict[str, object] = {
        "free_nbytes": space.free_nbytes,
        "total_nbytes": space.total_nbytes,
        "held_nbytes": mine,
        "held_is_all": is_all,
        "capacity_nbytes": place.capacity,
    }
    free = f"{format_bytes(space.free_nbytes)} of {format_bytes(space.total_nbytes)} are free"
    if place.capacity is None:
        return _SPACE.ok(f"in {place.path} {free}", **detail)
    if place.capacity == 0:
        most = format_bytes(space.free_nbytes // 10 * 9).replace(" ", "")
        return _SPACE.warn(
            f"in {place.path} {free}, and the tier has no capacity: it grows until none is",
            f"add the option capacity to its URL, at most {most}",
            **detail,
        )
    said = f"in {place.path} {free}; the tier may hold {format_bytes(place.capacity)}" + (
        f", of which {'' if is_all else 'at least '}{format_bytes(mine)} are there" if mine else ""
    )
    if place.capacity > space.free_nbytes + mine and is_all:
        advice = "lower the capacity, or give the directory a larger disk"
        return _SPACE.warn(said, advice, **detail)
    return _SPACE.ok(said, **detail)


def _inodes(machine: Machine, place: Place, at: str, object_nbytes: int) -> Finding:
    space = machine.space(at)
    if space is None or space.free_inodes is None:
        return _INODES.ok("the file system makes inodes as they are needed")
    room = place.capacity or space.free_nbytes
    need = room // object_nbytes
    found = f"{space.free_inodes:,} files may be made; about {need:,} objects fit"
    detail: dict[str, object] = {
        "free": space.free_inodes,
        "need": need,
        "object_nbytes": object_nbytes,
    }
    if need > space.free_inodes:
        advice = "use larger chunks, or a file system made with more inodes"
        return _INODES.warn(found, advice, **detail)
    return _INODES.ok(found, **detail)
