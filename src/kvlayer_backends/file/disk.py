"""The one door to the disk: whatever this package opens, looks at, lists, makes or removes.

Nothing is believed because it lies there. A file or folder counts only if it is one (no link, no
FIFO), belongs to this user and cannot be written by another; what is made is closed to others.
An error is never an absence: a name that is not there is None, everything else raises ``OSError``.

Blocking calls on threads, but for ``write_note``. Paths are text: pathlib costs several times more.
"""

# ruff: noqa: PTH102, PTH104, PTH106, PTH108, PTH208

from __future__ import annotations

import errno
import fcntl
import os
import stat
import sys
from concurrent.futures import Executor
from contextlib import suppress

import aiofiles

__all__ = [
    "LATEST_NS",
    "UntrustedError",
    "check_folder",
    "check_private",
    "check_way",
    "create",
    "exists",
    "has_way",
    "identity",
    "link",
    "list_folder",
    "look",
    "look_at_folder",
    "look_at_object",
    "make_folder",
    "make_folders",
    "move",
    "note_parent",
    "open_lock",
    "open_object",
    "own_folder",
    "parent",
    "read_note",
    "remove",
    "remove_folder",
    "replace",
    "stamp",
    "sync_folder",
    "write_note",
    "used_ns",
]

_ABSENT = frozenset({errno.ENOENT, errno.ENAMETOOLONG})
_SAFE = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC  # a FIFO would hold its opener for ever
_NO_FILE = frozenset({errno.ELOOP, errno.ENXIO, errno.ENODEV, errno.EACCES, errno.EISDIR})
"""What opening something else than a file of one's own may answer."""
_HASH_NBYTES = 32
_PARENT = "user.kvlayer.parent"
LATEST_NS = (1 << 63) - 1
"""In the year 2262. What a clock that jumped says beyond that is as late as any."""
_GET_GENERATION = 0x80087601  # FS_IOC_GETVERSION
_FOLDER_MODE = 0o700
_DEEPEST = 2048  # folders of one letter that fit the 4,096 bytes of a path
_FILE_MODE = 0o600


class UntrustedError(OSError):
    """Something lies there that may not be this user's work. ``hint`` says what to do about it."""

    def __init__(self, path: str, found: str, expected: str, hint: str) -> None:
        super().__init__(errno.EPERM, f"{found}; expected {expected}", path)
        self.hint = hint


def is_absent(exc: OSError) -> bool:
    """Whether the error only says that nothing has that name."""
    return exc.errno in _ABSENT


# -- looking -----------------------------------------------------------------------------------


def look(path: str) -> os.stat_result | None:
    """What has this name, a link itself included; None when nothing has."""
    try:
        return os.lstat(path)
    except OSError as exc:
        if is_absent(exc):
            return None
        raise


def exists(path: str) -> bool:
    """Whether anything has this name."""
    return look(path) is not None


def look_at_object(path: str) -> os.stat_result | None:
    """The file of this user with this name; None when there is none: whatever else is no object."""
    status = look(path)
    return status if status is not None and _is_own_file(status) else None


def look_at_folder(path: str) -> os.stat_result | None:
    """The folder of this user with this name; None when there is none."""
    status = look(path)
    return status if status is not None and _is_own_folder(status) else None


def used_ns(status: os.stat_result) -> int:
    """When an object was last used (Unix nanoseconds), in 64 bits: files may be of any year."""
    return min(status.st_mtime_ns, LATEST_NS)


def list_folder(path: str) -> list[str] | None:
    """The names in a folder; None when there is no folder."""
    try:
        return os.listdir(path)
    except OSError as exc:
        if is_absent(exc):
            return None
        raise


def _is_own_file(status: os.stat_result) -> bool:
    return stat.S_ISREG(status.st_mode) and _is_own(status)


def _is_own_folder(status: os.stat_result) -> bool:
    return stat.S_ISDIR(status.st_mode) and _is_own(status)


def _is_own(status: os.stat_result) -> bool:
    return status.st_uid == os.geteuid() and not status.st_mode & 0o022


# -- opening -----------------------------------------------------------------------------------


def open_object(path: str, flags: int = 0) -> tuple[int, os.stat_result] | None:
    """Open this user's file for reading: its descriptor and what it is.

    None when nothing has that name, or something that is not a file of this user.
    """
    try:
        fd = os.open(path, os.O_RDONLY | _SAFE | flags)
    except OSError as exc:
        if is_absent(exc) or (exc.errno in _NO_FILE and look_at_object(path) is None):
            return None
        raise
    try:
        status = os.fstat(fd)
        if _is_own_file(status):
            fd, kept = -1, fd
            return kept, status
        return None
    finally:
        if fd >= 0:
            os.close(fd)


def identity(fd: int) -> tuple[int, ...]:
    """Tells an open file from all that had its name before or will; renaming keeps it.

    Inode numbers are given again, so the number of times that happened is part of it. Where the
    file system does not say, the time of the last write or use stands for it.
    """
    status, generation = os.fstat(fd), bytearray(8)
    try:
        fcntl.ioctl(fd, _GET_GENERATION, generation)
    except OSError:
        return status.st_dev, status.st_ino, -status.st_mtime_ns
    return status.st_dev, status.st_ino, int.from_bytes(generation[:4], "little")


def read_note(path: str, nbytes: int) -> bytes | None:
    """The first bytes of a small file of this user; None when there is no such file."""
    opened = open_object(path)
    if opened is None:
        return None
    fd, _ = opened
    try:
        return os.read(fd, nbytes)
    finally:
        os.close(fd)


async def write_note(path: str, content: bytes, threads: Executor) -> None:
    """Make a small file on ``threads``. Raises ``OSError``.

    Closed by hand: leaving aiofiles' context closes on the loop's own threads, which the end of
    the process waits for.
    """
    file = await aiofiles.open(
        path, "xb", buffering=0, opener=lambda name, _: create(name), executor=threads
    )
    try:
        await file.write(content)
    finally:
        await file.close()


def create(path: str, flags: int = 0) -> int:
    """Make a file that was not there and open it for writing (and reading: probes do)."""
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | _SAFE | flags, _FILE_MODE)


def open_lock(path: str) -> int:
    """Open the file that is locked, made where it is missing. Raises ``UntrustedError``."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | _SAFE, _FILE_MODE)
    try:
        status = os.fstat(fd)
        if not _is_own_file(status):
            raise UntrustedError(path, _described(status), _wanted("file", _FILE_MODE), _HINT)
        fd, kept = -1, fd
        return kept
    finally:
        if fd >= 0:
            os.close(fd)


# -- making and removing -----------------------------------------------------------------------


def own_folder(path: str) -> None:
    """Make a folder that only this user may enter, or check that the one there is such a folder.

    Raises :class:`UntrustedError` when it is another's, a link, or open to others.
    """
    make_folder(path)
    check_private(path)


def check_private(path: str) -> None:
    """Raise ``UntrustedError`` unless this is a folder that only this user may enter."""
    status = os.lstat(path)
    if not _is_own_folder(status) or status.st_mode & 0o077:
        raise UntrustedError(path, _described(status), _wanted("folder", _FOLDER_MODE), _HINT)


def check_folder(path: str) -> None:
    """Raise ``UntrustedError`` unless this is a folder of this user that no other may write."""
    status = os.lstat(path)
    if not _is_own_folder(status):
        raise UntrustedError(path, _described(status), _wanted("folder", _FOLDER_MODE), _HINT)


def check_way(path: str) -> None:
    """Check the three folders that an object lies in, before anything there is changed.

    Else it would be changed wherever a link leads: who may write in the root can put one in the
    place of what was opened. Raises ``UntrustedError`` for a folder that
    is none of this user's, ``FileNotFoundError`` where there is none.
    """
    shard = path.rpartition("/")[0]
    namespace = shard.rpartition("/")[0]
    check_folder(namespace.rpartition("/")[0])
    check_folder(namespace)
    check_folder(shard)


def has_way(path: str) -> bool:
    """:func:`check_way`, and whether there are such folders."""
    try:
        check_way(path)
    except OSError as exc:
        if is_absent(exc):
            return False
        raise
    return True


def make_folder(path: str) -> bool:
    """Make a folder that is closed to others; False when something has that name already."""
    try:
        os.mkdir(path, _FOLDER_MODE)
    except FileExistsError:
        return False
    return True


def make_folders(path: str) -> None:
    """Make a folder, which no other may write, and what is missing above it."""
    missing = [path]
    while not _there(missing[-1]):
        above = missing[-1].rstrip("/").rpartition("/")[0]
        if not above or len(missing) > _DEEPEST:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        missing.append(above)
    for folder in missing[-2::-1]:
        if not _there(folder):  # a file system that lets nobody make any, as /proc
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), folder)


def _there(path: str) -> bool:
    """Make a folder where none is; False where what is above it is missing."""
    try:
        os.mkdir(path, 0o755)
    except FileNotFoundError:
        return False
    except FileExistsError:
        if not os.path.isdir(path):  # noqa: PTH112
            raise
    return True


def link(source: str, target: str) -> None:
    """Give a file a second name. Raises ``FileExistsError`` when that is taken."""
    os.link(source, target)


def move(source: str, target: str) -> None:
    """Rename a file; what had the new name is replaced."""
    os.rename(source, target)


def replace(source: str, target: str) -> None:
    """:func:`move` where a folder may have the new name: an empty one gives way."""
    try:
        os.rename(source, target)
    except IsADirectoryError:
        os.rmdir(target)
        os.rename(source, target)


def remove(path: str) -> bool:
    """Remove a file; False when nothing has that name."""
    try:
        os.unlink(path)
    except OSError as exc:
        if is_absent(exc):
            return False
        raise
    return True


def remove_folder(path: str) -> bool:
    """Remove an empty folder; False when it holds something, or nothing or no folder is there."""
    try:
        os.rmdir(path)
    except OSError as exc:
        if exc.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR) or is_absent(exc):
            return False
        raise
    return True


def stamp(target: str | int, used_ns: int) -> None:
    """Give a file, named or open, its time of use (Unix nanoseconds)."""
    used_ns = min(used_ns, LATEST_NS)
    if isinstance(target, int):
        os.utime(target, ns=(used_ns, used_ns))
    else:
        os.utime(target, ns=(used_ns, used_ns), follow_symlinks=False)


def note_parent(fd: int, parent: bytes) -> None:
    """Note beside an open file what comes before it, where the file system keeps attributes.

    That nothing does is noted, too: who looks need not ask the file itself.

    A note that cannot be made is none, as for :func:`parent`.
    """
    if sys.platform == "linux":
        with suppress(OSError):
            os.setxattr(fd, _PARENT, parent)


def parent(path: str) -> bytes | None:
    """What comes before a file, as it was noted beside it; empty: nothing. None: no note is there.

    It helps to choose what to give up and nothing else, so a note that cannot be read is none.
    """
    if sys.platform == "linux":
        with suppress(OSError):
            noted = os.getxattr(path, _PARENT, follow_symlinks=False)
            return noted if len(noted) in (0, _HASH_NBYTES) else None
    return None


def sync_folder(path: str) -> None:
    """Bring the names in a folder onto the medium."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


# -- saying what was found ---------------------------------------------------------------------

_HINT = (
    "users cannot share a directory: give each its own; or, if what lies there can be trusted, "
    "chown it to this user and chmod it to that mode"
)
_KINDS = {
    stat.S_IFREG: "file",
    stat.S_IFDIR: "folder",
    stat.S_IFLNK: "symbolic link",
    stat.S_IFIFO: "FIFO",
}


def _described(status: os.stat_result) -> str:
    kind = _KINDS.get(stat.S_IFMT(status.st_mode), "special file")
    return f"a {kind} of user {status.st_uid} with mode {stat.S_IMODE(status.st_mode):04o}"


def _wanted(kind: str, mode: int) -> str:
    return f"a {kind} of user {os.geteuid()} with mode {mode:04o}"
