"""What the namespaces in a directory stand for: one small file beside each one's objects."""

from __future__ import annotations

import logging
import os
from hashlib import sha256

from kvlayer_backends.file import disk
from kvlayer_backends.file.paths import Paths

__all__ = ["NAME", "read_all", "write"]

_log = logging.getLogger(__name__)

NAME = "namespace.msgpack"
_MAX_NBYTES = 64 * 1024


def write(paths: Paths, unfinished: str, namespace: str, canonical: bytes) -> None:
    """Describe a namespace unless it is described already. Blocking. Raises ``OSError``.

    ``unfinished`` is a path on the same filesystem that is this call's own.
    """
    folder = f"{paths.folder}/{namespace}"
    target = f"{folder}/{NAME}"
    if disk.look_at_object(target) is not None:
        return
    paths.make(folder)
    try:
        fd = disk.create(unfinished)
        try:
            os.write(fd, canonical)
        finally:
            os.close(fd)
        disk.replace(unfinished, target)
    finally:
        disk.remove(unfinished)


def read_all(paths: Paths) -> dict[str, bytes]:
    """Every description that is what its folder's name says. Blocking.

    One that cannot be read is left out. Raises ``OSError`` when the directory cannot be listed.
    """
    found: dict[str, bytes] = {}
    for name in filter(paths.is_namespace, disk.list_folder(paths.folder) or ()):
        try:
            canonical = disk.read_note(f"{paths.folder}/{name}/{NAME}", _MAX_NBYTES)
        except OSError as exc:
            _log.debug("file:// cannot read the description of namespace %s: %s", name, exc)
            continue
        if canonical is not None and sha256(canonical).hexdigest() == name:
            found[name] = canonical
    return found
