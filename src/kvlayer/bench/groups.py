"""Everything that ``kvlayer bench`` can measure. A new group of rows is one line here."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

from kvlayer.bench.directory import directory_rows
from kvlayer.bench.evict import evict_rows
from kvlayer.bench.file import file_rows
from kvlayer.bench.hashing import hash_rows
from kvlayer.bench.host import host_rows
from kvlayer.bench.lookup import lookup_rows
from kvlayer.bench.loop import loop_rows
from kvlayer.bench.measure import Row
from kvlayer.bench.portal import portal_rows
from kvlayer.bench.questions import question_rows
from kvlayer.bench.sick import sick_rows

__all__ = ["GROUPS", "Ask", "Group"]


@dataclass(frozen=True, slots=True)
class Ask:
    """What was asked for."""

    nbytes: int
    """Bytes to move at a time, where bytes move."""
    rounds: int
    """Samples of what takes long; what is quick takes more of them."""
    directory: Path
    """An empty directory of ours, on a disk for groups that need one. Removed afterwards."""
    say: Callable[[str], None]
    """Told what goes on; may be called often."""


@dataclass(frozen=True, slots=True)
class Group:
    """Rows that are measured together."""

    name: str
    rows: Callable[[Ask], Awaitable[list[Row]]]
    torch: bool = False
    """Whether it opens a cache or copies tensors."""
    disk: bool = False
    """Whether it writes files; about twice ``Ask.nbytes`` of them at a time."""


GROUPS = (
    Group("hash", lambda ask: hash_rows(ask.rounds)),
    Group("evict", lambda ask: evict_rows(ask.rounds)),
    Group("directory", lambda ask: directory_rows(ask.rounds)),
    Group("lookup", lambda ask: lookup_rows(ask.rounds), torch=True),
    Group("questions", lambda _: question_rows()),
    Group("portal", lambda ask: portal_rows(ask.rounds), torch=True),
    Group("host", lambda ask: host_rows(ask.nbytes, ask.rounds), torch=True),
    Group(
        "file",
        lambda ask: file_rows(ask.nbytes, ask.rounds, ask.directory, ask.say),
        torch=True,
        disk=True,
    ),
    Group(
        "loop",
        lambda ask: loop_rows(
            ask.nbytes, samples=min(10_000, 2_000 * ask.rounds), directory=str(ask.directory)
        ),
        torch=True,
        disk=True,
    ),
    Group("tier", lambda ask: sick_rows(min(ask.rounds, 3)), torch=True),
)
"""In the order they are measured."""
