"""What nobody but this user can have written: the door to files that are believed without a check.

A file counts as the user's own when it, and every folder and link on the way to it, belongs to the
user or to root and can be changed by nobody else. What fails this is not believed; it is no error.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

__all__ = ["is_own", "read_own"]

_MOST_LINKS = 40  # as Linux follows
_FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW


def is_own(path: str | os.PathLike[str]) -> bool:
    """Whether nobody but the user and root can change what ``path`` leads to. Never raises.

    Links are followed, each a step that must be the user's own, too. In a folder where everybody
    may write but remove only their own files (``/tmp``), an entry of the user's is the user's own.
    """
    try:
        return all(map(_is_private, _steps(os.fspath(path))))
    except (OSError, ValueError):  # not there, too many links, a NUL in the name
        return False


def read_own(path: str | os.PathLike[str], limit: int) -> bytes | None:
    """At most ``limit`` bytes of a regular file that is the user's own; None where it is not.

    Nothing is waited for: a pipe in its place is no file. Never raises.
    """
    if not is_own(path):
        return None
    try:
        with os.fdopen(os.open(path, _FLAGS), "rb") as file:
            status = os.fstat(file.fileno())  # of what was opened, not of what was looked at
            if stat.S_ISREG(status.st_mode) and _is_private(status):
                return file.read(limit)
    except OSError:
        pass
    return None


def _steps(path: str) -> Iterator[os.stat_result]:
    """The ``lstat`` of every step from the root to where ``path`` ends."""
    todo = [*reversed(Path(os.path.abspath(path)).parts[1:])]  # noqa: PTH100  # links stay
    at, links = os.sep, 0
    yield os.lstat(os.sep)
    while todo:
        name = todo.pop()
        step = os.path.dirname(at) if name == os.pardir else os.path.join(at, name)  # noqa: PTH118, PTH120
        status = os.lstat(step)
        yield status
        if not stat.S_ISLNK(status.st_mode):
            at = step
            continue
        links += 1
        if links > _MOST_LINKS:
            raise OSError(f"more than {_MOST_LINKS} links")
        target = Path(step).readlink()
        if target.is_absolute():
            at, target = os.sep, target.relative_to(os.sep)
        todo += reversed(target.parts)


def _is_private(status: os.stat_result) -> bool:
    """Whether a step belongs to the user or root, and only they can change it."""
    mode = status.st_mode
    if status.st_uid not in (0, os.geteuid()):
        return False
    if stat.S_ISLNK(mode):
        return True  # a link has no mode of its own
    if stat.S_ISDIR(mode) and mode & stat.S_ISVTX:
        return True  # others may add to it, and replace nothing of ours
    return not mode & stat.S_IWOTH and (not mode & stat.S_IWGRP or _is_ours_alone(status.st_gid))


def _is_ours_alone(group: int) -> bool:
    """Whether a group is the user's private one, as many systems give to each user."""
    try:
        import grp
        import pwd

        user, members = pwd.getpwuid(os.geteuid()), grp.getgrgid(group)
    except (ImportError, KeyError):  # no such system; a container's user
        return False
    is_named_so = user.pw_gid == group and members.gr_name == user.pw_name
    return is_named_so and set(members.gr_mem) <= {user.pw_name}
