"""Keeps verdicts on models between processes, in a file that only the user can have written.

A line per verdict: its key, what is wrong with pieces, what is wrong with padding, a checksum. The
file is a hint: what does not check is not there, and a folder that cannot be written is not used.
"""

from __future__ import annotations

import json
import os
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Final
from zlib import crc32

from kvlayer._home import cache_directory
from kvlayer.identity.own import is_own, read_own
from kvlayer_transformers.proof import Verdict

__all__ = ["Remembered"]

_NAME: Final = "verdicts.jsonl"
_MAX_NBYTES: Final = 1 << 20
_MAX_ENTRIES: Final = 1000


class Remembered:
    """Verdicts by key. ``directory`` None is the user's cache folder. Raises no ``OSError``."""

    def __init__(self, directory: Path | None = None) -> None:
        self._directory = directory or cache_directory()

    def get(self, key: str) -> Verdict | None:
        """The verdict of this key; None when it is not known."""
        return self._read().get(key)

    def put(self, key: str, verdict: Verdict) -> None:
        """Add a verdict. Of two processes that write at once, one may be forgotten."""
        if self._directory is None:
            return
        known = {**self._read(), key: verdict}
        lines = [_line(*entry) for entry in [*known.items()][-_MAX_ENTRIES:]]
        with suppress(OSError):
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            handle, scratch = tempfile.mkstemp(prefix=f".{_NAME}.", dir=self._directory)
            try:
                with os.fdopen(handle, "w", encoding="utf-8") as file:
                    file.write("".join(lines))
                Path(scratch).replace(self._directory / _NAME)
            except BaseException:
                Path(scratch).unlink(missing_ok=True)
                raise

    def _read(self) -> dict[str, Verdict]:
        if self._directory is None or not is_own(self._directory):
            return {}
        raw = read_own(self._directory / _NAME, _MAX_NBYTES) or b""
        parsed = (_parsed(line) for line in raw.decode("utf-8", "replace").splitlines())
        return dict(entry for entry in parsed if entry is not None)


def _line(key: str, verdict: Verdict) -> str:
    body = json.dumps([key, verdict.pieces, verdict.padding])
    return f"{crc32(body.encode()):08x} {body}\n"


def _parsed(line: str) -> tuple[str, Verdict] | None:
    checksum, _, body = line.partition(" ")
    if checksum != f"{crc32(body.encode()):08x}":
        return None
    with suppress(ValueError):
        match json.loads(body):
            case [str() as key, str() | None as pieces, str() | None as padding]:
                return key, Verdict(pieces, padding)
            case _:
                pass
    return None
