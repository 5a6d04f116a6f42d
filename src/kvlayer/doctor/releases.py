"""What the releases that share a tier's directory hold there, each in a folder of its own."""

from __future__ import annotations

import os
import re
import shlex
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from kvlayer.doctor.finding import Check, Finding
from kvlayer.identity.namespace import KEY_SCHEMA
from kvlayer.urls import format_bytes

__all__ = ["Held", "examine_releases", "held"]

_RELEASES = Check(
    "releases", "each release has its own folder and capacity; what is left of others takes room"
)
_FOLDER = re.compile(r"v([1-9][0-9]{0,5})")
_COUNT_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Held:
    """Bytes of the files in a tier's directory, by the folder's version; 0: beside them."""

    nbytes: Mapping[int, int] = field(default_factory=dict[int, int])
    is_all: bool = True
    """Whether all files were seen in the time there is."""

    @property
    def own(self) -> int:
        """Bytes of this release."""
        return self.nbytes.get(KEY_SCHEMA, 0)

    @property
    def total(self) -> int:
        return sum(self.nbytes.values())


def held(path: str) -> Held:
    """Look through a directory, for about a second."""
    end = time.monotonic() + _COUNT_SECONDS
    nbytes: dict[int, int] = {}
    for folder, _, names in os.walk(path):
        first = os.path.relpath(folder, path).partition(os.sep)[0]
        match = _FOLDER.fullmatch(first)
        version = int(match[1]) if match else 0
        for name in names:
            try:
                size = Path(folder, name).lstat().st_size
            except OSError:  # another process's: evicted since
                continue
            nbytes[version] = nbytes.get(version, 0) + size
        if time.monotonic() > end:
            return Held(nbytes, False)
    return Held(nbytes)


def examine_releases(path: str, found: Held) -> Finding:
    """Add up what all releases hold; say how what older ones have left is removed."""
    others = {n: size for n, size in found.nbytes.items() if n not in (0, KEY_SCHEMA) and size}
    at_least = "" if found.is_all else "at least "
    detail: dict[str, object] = {
        "held_nbytes": {f"v{n}": size for n, size in sorted(found.nbytes.items()) if n},
        "held_is_all": found.is_all,
    }
    mine = f"v{KEY_SCHEMA}, this release's, holds {at_least}{format_bytes(found.own)}"
    if not others:
        return _RELEASES.ok(f"in {path} {mine}, and no other release anything", **detail)
    theirs = ", ".join(f"v{n} {format_bytes(size)}" for n, size in sorted(others.items()))
    said = (
        f"in {path} {mine}; other releases hold {theirs}: "
        f"together {at_least}{format_bytes(found.own + sum(others.values()))}"
    )
    old = [shlex.quote(f"{path}/v{n}") for n in sorted(others) if n < KEY_SCHEMA]
    if not old:
        return _RELEASES.ok(f"{said}, which only later releases read", **detail)
    advice = f"once no process of the older release runs any more: rm -r {' '.join(old)}"
    return _RELEASES.warn(said, advice, **detail)
