"""What a directory holds and what to give up for more, decided. Pure: no clock, no I/O."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from heapq import merge
from itertools import islice
from typing import NamedTuple

from kvlayer.abc.backend import Listed
from kvlayer.abc.policy import EvictionPolicy
from kvlayer.errors import BackendError
from kvlayer.keys import ObjectKey
from kvlayer_backends.file.paths import Shard

__all__ = ["Eviction", "Ledger", "Victim"]

_AT_ONCE = 256
"""Victims taken in one go: they are removed within milliseconds, and others get a turn."""


@dataclass(slots=True)
class _Entry:
    nbytes: int
    used_ns: int


class Victim(NamedTuple):
    """An object chosen to go, unless its file says it was used after ``used_ns``."""

    key: ObjectKey
    nbytes: int
    used_ns: int
    entry: object
    """The ledger's entry when it was chosen: a file written since has another."""


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
    lies on disk is never more than what is counted.
    """

    def __init__(self, policy: EvictionPolicy, capacity: int) -> None:
        self.policy = policy
        self.capacity = capacity
        self.objects: dict[ObjectKey, _Entry] = {}
        self.quarantined_nbytes = 0
        self.granted_nbytes = 0
        """Room given to writes that have not ended yet."""
        self.unlisted_nbytes = 0
        """What should lie there and was not found yet, while the directory is first listed."""
        self._stored_nbytes = 0
        self._shards: defaultdict[Shard, set[ObjectKey]] = defaultdict(set)
        self._changed: dict[ObjectKey, None] | None = None
        self._runs: list[list[tuple[int, ObjectKey]]] = []
        self._taken: set[ObjectKey] = set()

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

    def add(self, key: ObjectKey, nbytes: int, used_ns: int) -> None:
        """Count an object. A known one stays as it is."""
        if key not in self.objects:
            self._add(key, nbytes, used_ns)
            self._note(key)

    def _add(self, key: ObjectKey, nbytes: int, used_ns: int) -> None:
        self.objects[key] = _Entry(nbytes, used_ns)
        self._stored_nbytes += nbytes
        self._shards[Shard.of(key)].add(key)
        self.policy.admit((key,))

    def create(self, key: ObjectKey, nbytes: int, used_ns: int) -> None:
        """Count a file that was just made, so none had been there: whatever is known is stale."""
        self.forget(key)
        self.add(key, nbytes, used_ns)

    def forget(self, key: ObjectKey) -> None:
        """The file is gone. Unknown keys are ignored."""
        entry = self.objects.pop(key, None)
        if entry is not None:
            self._stored_nbytes -= entry.nbytes
            self._shards[Shard.of(key)].discard(key)
            self.policy.remove(key)
        self._note(key)  # also an unknown one: a scan under way may have seen it

    def use(self, path: Sequence[ObjectKey], stamps: Iterable[int]) -> None:
        """Record one use of a path, root first; ``stamps`` are its files' new times."""
        for key, used_ns in zip(path, stamps, strict=True):
            entry = self.objects.get(key)
            if entry is not None:
                entry.used_ns = max(entry.used_ns, used_ns)
        self.policy.touch(path)

    def take(self, nbytes: int, at_least: int) -> list[Victim]:
        """The next victims, enough for ``nbytes`` and ``at_least`` so many if there are.

        Never more than can be removed and accounted for without holding others up: ask again. They
        stay counted and are not named again until ``settle``.
        """
        victims: list[Victim] = []
        while (nbytes > 0 or len(victims) < at_least) and len(victims) < _AT_ONCE:
            key = self.policy.victim()
            if key is None:
                break
            self.policy.remove(key)
            self._taken.add(key)
            entry = self.objects[key]
            victims.append(Victim(key, entry.nbytes, entry.used_ns, entry))
            nbytes -= entry.nbytes
        return victims

    def settle(self, victims: Sequence[Victim], eviction: Eviction) -> None:
        """Account for taken victims: those that nothing happened to are as before.

        Spared ones stay taken until ``spare``. A victim whose file was made anew meanwhile is left
        alone: what happened, happened to the file before it.
        """
        for victim in (*eviction.gone, *eviction.lost):
            if self.objects.get(victim.key) is victim.entry:
                self.forget(victim.key)
        self._taken.difference_update(victim.key for victim in victims)
        self._taken.update(victim.key for victim, _ in eviction.spared)
        left = {v.key for v in victims if self.objects.get(v.key) is v.entry}
        for victim in eviction.failed:  # most recent now, so that others are tried before it
            if victim.key in left:
                left.remove(victim.key)
                self.policy.admit((victim.key,))
        left.difference_update(victim.key for victim, _ in eviction.spared)
        for victim in victims:  # demoted keys go in the order in which they were
            if victim.key in left:
                self.policy.admit((victim.key,))
                self.policy.demote(victim.key)

    def spare(self, spared: Mapping[ObjectKey, int]) -> None:
        """Let victims be named again, in the order of the times (ns) at which they were used."""
        self._taken.difference_update(spared)
        for key, used_ns in sorted(spared.items(), key=lambda item: item[1]):
            if key in self.objects:
                self.objects[key].used_ns = used_ns
                self.policy.admit((key,))

    def begin_scan(self) -> None:
        """From here on what changes is newer than what a scan sees."""
        self._changed = {}
        self._runs = []

    def reconcile(self, shard: Shard, present: set[str]) -> None:
        """Forget what a scan did not find in a shard."""
        for key in tuple(self._shards[shard]):
            if key not in present and not self._is_newer(key):
                self.forget(key)

    def discover(self, found: Sequence[tuple[ObjectKey, int, int]]) -> None:
        """Add what a part of a scan found and nobody here had written, least recently used first.

        Where it stands among the others is settled by ``sort``.
        """
        run: list[tuple[int, ObjectKey]] = []
        for key, nbytes, used_ns in found:
            if key not in self.objects and not self._is_newer(key):
                self._add(key, nbytes, used_ns)
                self.unlisted_nbytes = max(self.unlisted_nbytes - nbytes, 0)
                run.append((used_ns, key))
        self._runs.append(run)

    def by_use(self) -> Iterator[tuple[int, ObjectKey]]:
        """What was found, and what changed meanwhile, by time of use: for ``sort``.

        Nothing in it changes the ledger, so a thread may draw from it.
        """
        mine = [
            (entry.used_ns, key)
            for key in self._changed or ()
            if (entry := self.objects.get(key)) is not None
        ]
        mine.sort()
        return merge(*self._runs, mine)

    def sort(self, used: Iterable[tuple[int, ObjectKey]]) -> None:
        """Put the next of ``by_use`` in order. What was used since stays as it is."""
        for used_ns, key in used:
            entry = self.objects.get(key)
            if entry is not None and entry.used_ns == used_ns and key not in self._taken:
                self.policy.admit((key,))

    def shards(self) -> list[Shard]:
        """Those that anything is known of."""
        return list(self._shards)

    def empty_shards(self) -> list[Shard]:
        """Those that were read, or written to, and hold nothing that is counted."""
        return [shard for shard, keys in self._shards.items() if not keys]

    def drop_shard(self, shard: Shard) -> None:
        """A shard's folder is gone."""
        if not self._shards[shard]:
            del self._shards[shard]

    def end_scan(self) -> None:
        """Everything is listed, or the scan was given up."""
        self._changed = None
        self._runs = []

    def listed(self, prefix: str, count: int) -> Iterator[list[Listed]]:
        """Objects whose key starts with ``prefix``, some ``count`` looked at for each batch.

        What changes meanwhile may or may not be seen.
        """
        keys = iter(tuple(self.objects))
        while some := tuple(islice(keys, count)):
            batch: list[Listed] = []
            for key in some:
                entry = self.objects.get(key) if key.startswith(prefix) else None
                if entry is not None:
                    batch.append(Listed(key, entry.nbytes, entry.used_ns / 1e9))
            yield batch

    def __iter__(self) -> Iterator[ObjectKey]:
        return iter(self.objects)

    def __len__(self) -> int:
        return len(self.objects)

    def _note(self, key: ObjectKey) -> None:
        if self._changed is not None:
            self._changed[key] = None

    def _is_newer(self, key: ObjectKey) -> bool:
        return self._changed is not None and key in self._changed
