"""Where things lie in the directory: key to path and back. Pure but for ``make``."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import NamedTuple

from kvlayer.identity.keys import PUBLIC_ZONE, ObjectKey, ObjectName
from kvlayer.identity.namespace import KEY_SCHEMA
from kvlayer_backends.file import disk

__all__ = ["VERSION", "Paths", "Shard"]

VERSION = f"v{KEY_SCHEMA}"
"""The folder of this release's objects. Releases that name objects otherwise keep their own."""

_NAMESPACE = re.compile(r"[0-9a-f]{64}")
_SHARD = re.compile(r"[0-9a-f]{2}|[0-9a-f]{32}")
_INSIDE = re.compile(
    r"([0-9a-f]{64})/([0-9a-f]{32}|0)/([0-9a-f]{64}-[1-9][0-9]*)/([a-z0-9_.:-]+)/([a-z0-9_.-]+)"
)
_FILE = re.compile(r"([^.]+)\.([^/]+?)\.([0-9][^/]*)")
"""Of what an encoding is made the first is a number, which nothing is that a part is made of."""


_DIGITS = 64
_HASH = re.compile(r"[0-9a-f]{64}")


@lru_cache(maxsize=1024)  # a directory's objects differ in their hashes
def _is_end(end: str) -> bool:
    """Whether a name may go on so after its hash: ``-tokens.part.encoding``."""
    match = _FILE.fullmatch("0" + end)
    if match is None:
        return False
    name, part, encoding = match.groups()
    zeros = "0" * _DIGITS
    try:
        ObjectName.parse(f"{zeros}/{PUBLIC_ZONE}/{zeros}{name[1:]}/{part}/{encoding}")
    except ValueError:
        return False
    return True


class Shard(NamedTuple):
    """One folder of a namespace: a private zone's, or one of the 256 of the public zone."""

    namespace: str
    folder: str
    """A zone's 32 hex digits, or the first 2 of the end hashes in it."""

    @classmethod
    def of(cls, key: ObjectKey) -> Shard:
        namespace, zone, name, _ = key.split("/", 3)
        return cls(namespace, name[:2] if zone == PUBLIC_ZONE else zone)


class Paths:
    """The layout of one directory.

    ::

        <root>/v2/<namespace>/<first 2 hex of end hash>/<end hash>-<tokens>.<part>.<encoding>
        <root>/v2/<namespace>/<zone>/<end hash>-<tokens>.<part>.<encoding>   of a private zone
        <root>/v2/<namespace>/namespace.msgpack   what the digest stands for
        <root>/v2/tmp/<uuid>/            one process's unfinished files
        <root>/v2/quarantine/            the newest damaged objects
        <root>/v2/janitor.lock           and what the last janitor counted

    A name that does not parse is not an object: never listed, counted or deleted. An object in an
    encoding that this release cannot read is one all the same, counted and evicted like others.
    What lies beside ``v2`` is another release's and is never touched.
    """

    def __init__(self, root: str) -> None:
        self.root = root
        self.folder = f"{root}/{VERSION}"
        self.tmp = f"{self.folder}/tmp"  # noqa: S108
        self.quarantine = f"{self.folder}/quarantine"
        self.janitor_lock = f"{self.folder}/janitor.lock"

    def object(self, key: str) -> str:
        """Raises ``ValueError`` for a key that would name anything but a file in a shard.

        Of the part it checks only that; who creates a file parses the whole key.
        """
        match = _INSIDE.fullmatch(key)
        if match is None:
            raise ValueError(f"not an object key: {key!r}")
        namespace, zone, end, part, encoding = match.groups()
        folder = end[:2] if zone == PUBLIC_ZONE else zone
        return f"{self.folder}/{namespace}/{folder}/{end}.{part}.{encoding}"

    def shard(self, shard: Shard) -> str:
        return f"{self.folder}/{shard.namespace}/{shard.folder}"

    @staticmethod
    def text(shard: Shard, name: str) -> str | None:
        """What the file would be the object of, unchecked: None when it cannot be one."""
        match = _FILE.fullmatch(name)
        if match is None:
            return None
        end, part, encoding = match.groups()
        zone = shard.folder
        if len(zone) == 2:
            if not end.startswith(zone):
                return None
            zone = PUBLIC_ZONE
        return f"{shard.namespace}/{zone}/{end}/{part}/{encoding}"

    @classmethod
    def key(cls, shard: Shard, name: str) -> ObjectName | None:
        """Inverse of ``object``; None for a name ``object`` cannot produce."""
        text = cls.text(shard, name)
        if text is None or not _HASH.match(name) or not _is_end(name[_DIGITS:]):
            return None
        return ObjectName(text)

    @staticmethod
    def is_namespace(name: str) -> bool:
        return _NAMESPACE.fullmatch(name) is not None

    @staticmethod
    def is_shard(name: str) -> bool:
        return _SHARD.fullmatch(name) is not None

    def make(self, folder: str) -> None:
        """Create ``folder`` (``v2`` or below it) and what is missing above. Raises ``OSError``.

        All are closed to other users, because KV tells what was said. What is there already is
        checked, on the whole way down from ``v2``: a link, or a folder that others can write, or
        may have made, is refused (``UntrustedError``), and nothing is made behind it.
        """
        if folder == self.folder:
            disk.make_folders(self.root)
            disk.own_folder(folder)
            return
        above = folder.rpartition("/")[0]
        try:
            self._check(above)  # or it would be made wherever a link leads
            made = disk.make_folder(folder)  # nearly always only the last of them is missing
        except FileNotFoundError:
            self.make(above)
            made = disk.make_folder(folder)
        if not made:
            disk.check_folder(folder)

    def _check(self, folder: str) -> None:
        """Check ``v2`` and what is between it and ``folder``, from the top. Raises ``OSError``."""
        if folder != self.folder:
            self._check(folder.rpartition("/")[0])
        disk.check_folder(folder)
