"""What a directory holds and what to give up for more, decided. Pure: no clock, no I/O."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from heapq import merge
from typing import NamedTuple

from kvlayer.abc.backend import Listed, Write
from kvlayer.abc.policy import PolicyMaker
from kvlayer.errors import BackendError
from kvlayer.eviction.lru import PrefixLRU
from kvlayer.eviction.order import EvictionOrder
from kvlayer.keys import ObjectKey
from kvlayer.memory.key_table import KeyTable
from kvlayer_backends.file.depths import Depths
from kvlayer_backends.file.paths import Shard

__all__ = ["Eviction", "Ledger", "Victim"]

_NOBODY = -1
_AT_ONCE = 256
"""Victims taken in one go: they are removed within milliseconds, and others get a turn."""


class Victim(NamedTuple):
    """An object chosen to go, unless its file says it was used after ``used_ns``."""

    key: ObjectKey
    nbytes: int
    used_ns: int
    entry: int
    """The ledger's number of it when it was chosen: a file written since has another."""


@dataclass(slots=True)
class Eviction:
    """What became of victims. A thread fills it, so that a cancelled wait loses nothing."""

    gone: list[Victim] = field(default_factory=list[Victim])
    lost: list[Victim] = field(default_factory=list[Victim])
    """Somebody else had deleted them."""
    spared: list[tuple[Victim, int]] = field(default_factory=list[tuple[Victim, int]])
    """Another process used them, at that time (ns)."""
    failed: list[Victim] = field(default_factory=list[Victim])
    error: BackendError | None = None
    freed_nbytes: int = 0
    """Bytes of those that are gone or lost."""

    def go(self, victim: Victim) -> None:
        """It was removed."""
        self.gone.append(victim)
        self.freed_nbytes += victim.nbytes

    def lose(self, victim: Victim) -> None:
        """It was not there."""
        self.lost.append(victim)
        self.freed_nbytes += victim.nbytes


class Ledger:
    """The objects of one directory as its janitor counts them.

    Bytes are counted from the moment room is granted for them until their file is gone, so what
    lies on disk is never more than what is counted. Some 300 bytes an object, in flat arrays.
    """

    def __init__(
        self, policy: PolicyMaker, capacity: int, clock: Callable[[], float] = float
    ) -> None:
        """``clock``: monotonic seconds. By default time stands still."""
        self.order = EvictionOrder(policy)
        self._depths = Depths(self.order.rows, clock)
        self.capacity = capacity
        self.quarantined_nbytes = 0
        self.granted_nbytes = 0
        """Room given to writes that have not ended yet."""
        self.unlisted_nbytes = 0
        """What should lie there and was not found yet, while the directory is first listed."""
        self._keys = KeyTable()
        self._used_ns = array("q")
        self._entries = array("Q")
        """By row, which of all objects ever counted it is; 0 where there is none."""
        self._entry = 0
        self._stored_nbytes = 0
        self._shards = _Shards()
        self._changed: dict[str, None] | None = None
        self._runs: list[_Run] = []

    @property
    def used_nbytes(self) -> int:
        return (
            self._stored_nbytes
            + self.unlisted_nbytes
            + self.quarantined_nbytes
            + self.granted_nbytes
        )

    def excess(self, nbytes: int = 0) -> int:
        """How many bytes must go before ``nbytes`` more fit; not positive when they fit now."""
        return self.used_nbytes + nbytes - self.capacity if self.capacity else 0

    def add(self, key: ObjectKey, nbytes: int, used_ns: int, write: Write | None = None) -> None:
        """Count an object; ``write`` says what it holds. A known one stays as it is."""
        if key not in self._keys:
            self._add(key, nbytes, used_ns, write)
            self._note(key)

    def _add(self, key: ObjectKey, nbytes: int, used_ns: int, write: Write | None = None) -> int:
        if write is None:
            row = self.order.add(hash(key), nbytes)
        else:
            row = self.order.add(
                hash(key),
                nbytes,
                first_token=write.first_token,
                tokens=write.tokens,
                retention=write.retention,
            )
        if row == len(self._used_ns):
            self._used_ns.append(0)
            self._entries.append(0)
        self._entry += 1
        self._used_ns[row], self._entries[row] = used_ns, self._entry
        self._keys.add(key, row)
        self._shards.add(Shard.of(key), row)
        self._stored_nbytes += nbytes
        self._depths.add((row,))
        return row

    def create(self, key: ObjectKey, nbytes: int, used_ns: int, write: Write | None = None) -> None:
        """Count a file that was just made, so none had been there: whatever is known is stale."""
        self.forget(key)
        self.add(key, nbytes, used_ns, write)

    def forget(self, key: ObjectKey, *, evicted: bool = False) -> None:
        """The file is gone; ``evicted``: to make room. Unknown keys are ignored."""
        row = self._keys.pop(key)
        if row is not None:
            self._stored_nbytes -= self.order.rows.nbytes[row]
            self._shards.discard(Shard.of(key), row)
            self._entries[row] = 0
            self._depths.discard(row)
            self.order.remove(row, evicted=evicted)
        self._note(key)  # also an unknown one: a scan under way may have seen it

    def use(self, path: Sequence[ObjectKey], stamps: Iterable[int]) -> None:
        """Record one use of a path, root first; ``stamps`` are its files' new times."""
        used: list[int] = []
        for key, used_ns in zip(path, stamps, strict=True):
            row = self._keys.row(key)
            if row is not None:
                self._used_ns[row] = max(self._used_ns[row], used_ns)
                used.append(row)
        self.order.touch(used)
        self._depths.add(used)

    def take(
        self, nbytes: int, at_least: int, now: float, write: Write | None = None
    ) -> list[Victim]:
        """The next victims, enough for ``nbytes`` and ``at_least`` so many if there are.

        None that may come before ``write``, for which they make room: without it that were dead.

        Never more than can be removed and accounted for without holding others up: ask again. They
        stay counted and are not named again until ``settle``. ``now``: Unix seconds.
        """
        victims: list[Victim] = []
        while (nbytes > 0 or len(victims) < at_least) and len(victims) < _AT_ONCE:
            row = self.order.victim(now)
            if row is None:
                break
            if self.order.name == PrefixLRU.name:
                row = self._depths.instead_of(row)
                if write is not None and self._depths.lies_before(row, write):
                    break
            self._depths.discard(row)
            self.order.pin((row,))
            size, used_ns = self.order.rows.nbytes[row], self._used_ns[row]
            victims.append(Victim(self._keys.key(row), size, used_ns, self._entries[row]))
            nbytes -= size
        return victims

    def settle(self, victims: Sequence[Victim], eviction: Eviction) -> None:
        """Account for taken victims: those that nothing happened to are as before.

        Spared ones stay taken until ``spare``. A victim whose file was made anew meanwhile is left
        alone: what happened, happened to the file before it.
        """
        for victim in eviction.gone:
            if self._row(victim) is not None:
                self.forget(victim.key, evicted=True)
        for victim in eviction.lost:
            if self._row(victim) is not None:
                self.forget(victim.key)
        for victim in eviction.failed:  # most recent now, so that others are tried before it
            if (row := self._row(victim)) is not None:
                self.order.unpin((row,), used=False)
        others = {victim.key for victim, _ in eviction.spared}
        others.update(victim.key for victim in eviction.failed)
        for victim in victims:  # demoted ones go in the order in which they were
            if victim.key not in others and (row := self._row(victim)) is not None:
                self.order.demote(row)
                self.order.unpin((row,), used=False)

    def _row(self, victim: Victim) -> int | None:
        """The row of a victim whose file is still the one that was chosen."""
        row = self._keys.row(victim.key)
        return row if row is not None and self._entries[row] == victim.entry else None

    def spare(self, spared: Mapping[ObjectKey, int]) -> None:
        """Let victims be named again, in the order of the times (ns) at which they were used."""
        for key, used_ns in sorted(spared.items(), key=lambda item: item[1]):
            row = self._keys.row(key)
            if row is not None:
                self._used_ns[row] = used_ns
                self.order.unpin((row,), used=False)
                self.order.touch((row,))

    def begin_scan(self) -> None:
        """From here on what changes is newer than what a scan sees."""
        self._changed = {}
        self._runs = []

    def reconcile(self, shard: Shard, present: set[str]) -> None:
        """Forget what a scan did not find in a shard."""
        for row in self._shards.rows(shard):
            key = self._keys.key(row)
            if key not in present and not self._is_newer(key):
                self.forget(key)

    def discover(self, found: Sequence[tuple[ObjectKey, int, int]]) -> None:
        """Add what a part of a scan found and nobody here had written, least recently used first.

        Where it stands among the others is settled by ``sort``.
        """
        run = _Run()
        for key, nbytes, used_ns in found:
            if key not in self._keys and not self._is_newer(key):
                row = self._add(key, nbytes, used_ns)
                self.unlisted_nbytes = max(self.unlisted_nbytes - nbytes, 0)
                run.append(used_ns, row, self._entries[row])
        self._runs.append(run)

    def by_use(self) -> Iterator[tuple[int, int, int]]:
        """What was found, and what changed meanwhile, by time of use: for ``sort``.

        Nothing in it changes the ledger, so a thread may draw from it.
        """
        rows = [row for key in self._changed or () if (row := self._keys.row(key)) is not None]
        mine = _Run()
        for row in sorted(rows, key=self._used_ns.__getitem__):
            mine.append(self._used_ns[row], row, self._entries[row])
        return merge(*self._runs, mine)

    def sort(self, used: Iterable[tuple[int, int, int]]) -> None:
        """Put the next of ``by_use`` in order. What was used since stays as it is."""
        for used_ns, row, entry in used:
            if self._entries[row] == entry and self._used_ns[row] == used_ns:
                self.order.refresh((row,))

    def shards(self) -> list[Shard]:
        """Those that anything is known of."""
        return self._shards.known()

    def empty_shards(self) -> list[Shard]:
        """Those that were read, or written to, and hold nothing that is counted."""
        return [shard for shard in self._shards.known() if self._shards.is_empty(shard)]

    def drop_shard(self, shard: Shard) -> None:
        """A shard's folder is gone."""
        self._shards.drop(shard)

    def end_scan(self) -> None:
        """Everything is listed, or the scan was given up."""
        self._changed = None
        self._runs = []

    def listed(self, prefix: str, first: int, count: int) -> tuple[list[Listed], int]:
        """Objects whose key starts with ``prefix``, of ``count`` rows from ``first`` on.

        And the row to go on with; as many as there are rows when all were looked at.
        """
        stop = min(first + count, len(self._entries))
        found: list[Listed] = []
        for row in range(first, stop):
            if self._entries[row] and (key := self._keys.key(row)).startswith(prefix):
                nbytes = self.order.rows.nbytes[row]
                found.append(Listed(key, nbytes, self._used_ns[row] / 1e9))
        return found, stop

    @property
    def rows(self) -> int:
        """How many rows there are, those that are free included."""
        return len(self._entries)

    def __iter__(self) -> Iterator[ObjectKey]:
        return iter(self._keys)

    def __contains__(self, key: object) -> bool:
        """Whether an object is counted. Any thread may ask."""
        return key in self._keys

    def __len__(self) -> int:
        return len(self._keys)

    def _note(self, key: ObjectKey) -> None:
        if self._changed is not None:
            self._changed[str(key)] = None

    def _is_newer(self, key: ObjectKey) -> bool:
        return self._changed is not None and key in self._changed


class _Run:
    """Objects by time of use, the earliest first, in flat arrays: (ns, row, entry) each."""

    def __init__(self) -> None:
        self._used_ns = array("q")
        self._rows = array("I")
        self._entries = array("Q")

    def append(self, used_ns: int, row: int, entry: int) -> None:
        self._used_ns.append(used_ns)
        self._rows.append(row)
        self._entries.append(entry)

    def __iter__(self) -> Iterator[tuple[int, int, int]]:
        return zip(self._used_ns, self._rows, self._entries, strict=True)


class _Shards:
    """Which rows lie in which shard: a list for each, linked through flat arrays.

    A shard that has become empty stays known until it is dropped.
    """

    def __init__(self) -> None:
        self._first: dict[Shard, int] = {}
        self._next = array("i")
        self._previous = array("i")

    def add(self, shard: Shard, row: int) -> None:
        more = row + 1 - len(self._next)
        if more > 0:
            self._next.frombytes(bytes(more * self._next.itemsize))
            self._previous.frombytes(bytes(more * self._previous.itemsize))
        after = self._first.get(shard, _NOBODY)
        self._first[shard] = row
        self._previous[row], self._next[row] = _NOBODY, after
        if after != _NOBODY:
            self._previous[after] = row

    def discard(self, shard: Shard, row: int) -> None:
        before, after = self._previous[row], self._next[row]
        if after != _NOBODY:
            self._previous[after] = before
        if before != _NOBODY:
            self._next[before] = after
        else:
            self._first[shard] = after

    def rows(self, shard: Shard) -> list[int]:
        """Those of one shard, which is known from now on."""
        rows: list[int] = []
        row = self._first.setdefault(shard, _NOBODY)
        while row != _NOBODY:
            rows.append(row)
            row = self._next[row]
        return rows

    def known(self) -> list[Shard]:
        return list(self._first)

    def is_empty(self, shard: Shard) -> bool:
        return self._first.get(shard, _NOBODY) == _NOBODY

    def drop(self, shard: Shard) -> None:
        if self.is_empty(shard):
            self._first.pop(shard, None)
