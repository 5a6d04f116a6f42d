"""What the namespaces in a directory stand for: one small file beside each one's objects."""

# Strings and os calls, as everywhere in this package.
# ruff: noqa: PTH105, PTH118, PTH123, PTH208

from __future__ import annotations

import logging
import os
from contextlib import suppress
from hashlib import sha256

from kvlayer_backends.file.paths import Paths

__all__ = ["read_all", "write"]

_log = logging.getLogger(__name__)

_NAME = "namespace.msgpack"
_MAX_NBYTES = 64 * 1024


def write(paths: Paths, unfinished: str, namespace: str, canonical: bytes) -> None:
    """Describe a namespace unless it is described already. Blocking; failing costs nothing.

    ``unfinished`` is a path on the same filesystem that is this call's own.
    """
    folder = f"{paths.folder}/{namespace}"
    target = os.path.join(folder, _NAME)
    if os.path.exists(target):  # noqa: PTH110
        return
    try:
        paths.make(folder)
        with open(unfinished, "wb") as file:
            file.write(canonical)
        os.replace(unfinished, target)
    except OSError as exc:
        _log.debug("file:// cannot describe namespace %s: %s", namespace, exc)
        with suppress(OSError):
            os.unlink(unfinished)  # noqa: PTH108


def read_all(paths: Paths) -> dict[str, bytes]:
    """Every description that is what its folder's name says. Blocking."""
    found: dict[str, bytes] = {}
    with suppress(OSError):
        for name in filter(paths.is_namespace, os.listdir(paths.folder)):
            with suppress(OSError), open(f"{paths.folder}/{name}/{_NAME}", "rb") as file:
                canonical = file.read(_MAX_NBYTES)
                if sha256(canonical).hexdigest() == name:
                    found[name] = canonical
    return found
