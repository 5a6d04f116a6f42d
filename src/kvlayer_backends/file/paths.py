"""Where things lie in the directory: key to path and back. Pure but for ``make``."""

# Strings and os calls: pathlib costs several times more, on thousands of paths a second.
# ruff: noqa: PTH102, PTH103

from __future__ import annotations

import os
import re
from contextlib import suppress
from typing import NamedTuple

from kvlayer.keys import ObjectKey

__all__ = ["Paths", "Shard"]

_NAMESPACE = re.compile(r"[0-9a-f]{64}")
_SHARD = re.compile(r"[0-9a-f]{2}")
_INSIDE = re.compile(r"([0-9a-f]{64})/([0-9a-f]{1,32})/(([0-9a-f]{2})[0-9a-f]{62})/([a-z0-9_.:-]+)")


class Shard(NamedTuple):
    """One of a namespace's 256 directories: the objects whose chunk hash starts alike."""

    namespace: str
    prefix: str

    @classmethod
    def of(cls, key: ObjectKey) -> Shard:
        namespace, _, chunk, _ = key.split("/", 3)
        return cls(namespace, chunk[:2])


class Paths:
    """The layout of one directory.

    ::

        <root>/v1/<namespace>/<first 2 hex of chunk hash>/<zone>.<chunk hash>.<part>
        <root>/v1/<namespace>/namespace.msgpack   what the digest stands for
        <root>/v1/tmp/<uuid>/            one process's unfinished files
        <root>/v1/quarantine/            the newest damaged objects
        <root>/v1/janitor.lock

    A name that does not parse is not an object: never listed, counted or deleted.
    """

    def __init__(self, root: str) -> None:
        self.root = root
        self.v1 = f"{root}/v1"
        self.tmp = f"{self.v1}/tmp"  # noqa: S108
        self.quarantine = f"{self.v1}/quarantine"
        self.janitor_lock = f"{self.v1}/janitor.lock"

    def object(self, key: str) -> str:
        """Raises ``ValueError`` for a key that would name anything but a file in a shard.

        Of the part it checks only that; who creates a file parses the whole key.
        """
        match = _INSIDE.fullmatch(key)
        if match is None:
            raise ValueError(f"not an object key: {key!r}")
        namespace, zone, chunk, prefix, part = match.groups()
        return f"{self.v1}/{namespace}/{prefix}/{zone}.{chunk}.{part}"

    def shard(self, shard: Shard) -> str:
        return f"{self.v1}/{shard.namespace}/{shard.prefix}"

    @staticmethod
    def text(shard: Shard, name: str) -> str | None:
        """What the file would be the object of, unchecked: None when it cannot be one."""
        fields = name.split(".", 2)
        if len(fields) != 3 or not fields[1].startswith(shard.prefix):
            return None
        return f"{shard.namespace}/{fields[0]}/{fields[1]}/{fields[2]}"

    @classmethod
    def key(cls, shard: Shard, name: str) -> ObjectKey | None:
        """Inverse of ``object``; None for a name ``object`` cannot produce."""
        text = cls.text(shard, name)
        try:
            return None if text is None else ObjectKey.parse(text)
        except ValueError:
            return None

    @staticmethod
    def is_namespace(name: str) -> bool:
        return _NAMESPACE.fullmatch(name) is not None

    @staticmethod
    def is_shard(name: str) -> bool:
        return _SHARD.fullmatch(name) is not None

    def make(self, directory: str) -> None:
        """Create ``directory`` (``v1`` or below it) and what is missing above. Raises ``OSError``.

        ``v1`` is closed to other users, because KV tells what was said; whoever wants to share
        with them changes the mode of that one directory.
        """
        try:
            os.mkdir(directory)  # nearly always only the last of them is missing
        except FileExistsError:
            return
        except FileNotFoundError:
            os.makedirs(self.root, exist_ok=True)
            with suppress(FileExistsError):
                os.mkdir(self.v1, 0o700)
            os.makedirs(directory, exist_ok=True)
