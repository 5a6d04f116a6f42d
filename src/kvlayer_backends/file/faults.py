"""What the operating system refused, as an error a person can act on."""

from __future__ import annotations

import errno

from kvlayer.errors import BackendError
from kvlayer_backends.file.disk import UntrustedError

__all__ = ["explain", "readonly"]

_DENIED = "give this user read, write and search permission there, or open with readonly=true"
_HINTS = {
    errno.ENOSPC: "the disk is full: free space, or set capacity below what the disk can hold",
    errno.EDQUOT: "the disk quota is used up: raise it, or set a lower capacity",
    errno.EFBIG: "the file size limit is too low for one object: see ulimit -f",
    errno.EACCES: _DENIED,
    errno.EPERM: _DENIED,
    errno.EROFS: "the filesystem is read-only: remount it, or open with readonly=true",
    errno.EMFILE: "too many open files in this process: raise ulimit -n, or lower threads",
    errno.ENFILE: "too many open files on this machine: raise fs.file-max",
    errno.EIO: "the disk reports I/O errors: look at dmesg and replace it",
    errno.ENOENT: "the directory is gone: was it deleted or unmounted?",
    errno.ENOTDIR: "something on the path is a file, not a directory",
    errno.ENOLCK: "the filesystem has no flock: use a local disk",
    errno.EOPNOTSUPP: "the filesystem lacks what kvlayer needs (flock): use a local disk",
    errno.ETIMEDOUT: "is it being snapshotted (fsfreeze)? Writes go on once it thaws",
    errno.ENAMETOOLONG: "the filesystem allows no name this long: use another one",
}
_TRANSIENT = frozenset(
    {errno.EMFILE, errno.ENFILE, errno.EAGAIN, errno.ENOMEM, errno.ENOSPC, errno.ETIMEDOUT}
)


def explain(exc: OSError, doing: str, path: str) -> BackendError:
    """``exc`` as a value.

    It keeps no reference to ``exc``: a traceback would hold the lent buffers of its frames.
    """
    if isinstance(exc, UntrustedError):
        return BackendError(
            f"file://: cannot {doing}: {exc.filename} is {exc.strerror}", hint=exc.hint
        )
    code = exc.errno or 0
    name = errno.errorcode.get(code, str(code))
    error = BackendError(
        f"file://: cannot {doing} {path}: {exc.strerror or exc} ({name})", hint=_HINTS.get(code)
    )
    error.transient = code in _TRANSIENT
    return error


def readonly(operation: str, root: str) -> BackendError:
    """What a read-only backend answers to a change."""
    return BackendError(
        f"file://: cannot {operation}: {root} is opened with readonly=true",
        hint="leave readonly out of the URL, or set write = 'never' on the tier",
    )
