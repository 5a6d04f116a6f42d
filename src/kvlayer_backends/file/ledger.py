"""What a directory holds and what to give up for more, decided. Pure: no clock, no I/O."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from kvlayer.abc.policy import EvictionPolicy
from kvlayer.errors import BackendError
from kvlayer.keys import ObjectKey
from kvlayer_backends.file.paths import Shard

__all__ = ["Eviction", "Ledger", "Victim"]


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

    @property
    def freed_nbytes(self) -> int:
        return sum(v.nbytes for v in self.gone) + sum(v.nbytes for v in self.lost)


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
        self._stored_nbytes = 0
        self._shards: defaultdict[Shard, set[ObjectKey]] = defaultdict(set)
        self._changed: set[ObjectKey] | None = None

    @property
    def used_nbytes(self) -> int:
        return self._stored_nbytes + self.quarantined_nbytes + self.granted_nbytes

    def excess(self, nbytes: int = 0) -> int:
        """How many bytes must go before ``nbytes`` more fit; not positive when they fit now."""
        return self.used_nbytes + nbytes - self.capacity if self.capacity else 0

    def add(self, key: ObjectKey, nbytes: int, used_ns: int) -> None:
        """Count an object. A known one stays as it is."""
        if key not in self.objects:
            self.objects[key] = _Entry(nbytes, used_ns)
            self._stored_nbytes += nbytes
            self._shards[Shard.of(key)].add(key)
            self.policy.admit((key,))
            self._note(key)

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

        They stay counted and are not named again until ``settle``.
        """
        victims: list[Victim] = []
        while (nbytes > 0 or len(victims) < at_least) and (key := self.policy.victim()) is not None:
            self.policy.remove(key)
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
        for key, used_ns in sorted(spared.items(), key=lambda item: item[1]):
            if key in self.objects:
                self.objects[key].used_ns = used_ns
                self.policy.admit((key,))

    def begin_scan(self) -> None:
        """From here on what changes is newer than what a scan sees."""
        self._changed = set()

    def reconcile(self, shard: Shard, present: set[str]) -> None:
        """Forget what a scan did not find in a shard."""
        for key in tuple(self._shards.get(shard, ())):
            if key not in present and not self._is_newer(key):
                self.forget(key)

    def discover(self, found: Iterable[tuple[ObjectKey, int, int]]) -> None:
        """Add what a scan found and nobody here had written."""
        for key, nbytes, used_ns in found:
            if not self._is_newer(key):
                self.add(key, nbytes, used_ns)

    def end_scan(self) -> None:
        self._changed = None

    def __iter__(self) -> Iterator[ObjectKey]:
        return iter(self.objects)

    def __len__(self) -> int:
        return len(self.objects)

    def _note(self, key: ObjectKey) -> None:
        if self._changed is not None:
            self._changed.add(key)

    def _is_newer(self, key: ObjectKey) -> bool:
        return self._changed is not None and key in self._changed
