"""What a directory holds and what to give up for more, decided. Pure: no clock, no I/O."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from heapq import merge
from operator import itemgetter

from kvlayer.abc.backend import Listed, Write
from kvlayer.abc.policy import PolicyMaker
from kvlayer.eviction.lru import PrefixLRU
from kvlayer.eviction.order import EvictionOrder
from kvlayer.identity.keys import ObjectKey
from kvlayer.memory.key_table import KeyTable
from kvlayer_backends.file.lineage import Lineage
from kvlayer_backends.file.paths import Shard
from kvlayer_backends.file.refusals import Refusals
from kvlayer_backends.file.rings import Rings
from kvlayer_backends.file.runs import Run
from kvlayer_backends.file.shards import Shards
from kvlayer_backends.file.victims import Eviction, Victim

__all__ = ["Ledger"]

_AT_ONCE = 16
"""Victims taken in one go: they are removed within milliseconds, and others get a turn."""
_LOOKS = 128  # objects passed over for what follows them before the loop gets a turn


class Ledger:
    """The objects of one directory as its janitor counts them.

    Bytes are counted from the moment room is granted for them until their file is gone, so what
    lies on disk is never more than what is counted. Some 150 bytes an object, in flat arrays.

    With ``prefix-lru`` an object goes only when nothing follows it in a prompt. One whose turn
    comes before *waits*, out of the policy's order, and goes next once its last follower has gone.
    """

    def __init__(self, policy: PolicyMaker, capacity: int) -> None:
        self.order = EvictionOrder(policy)
        self.capacity = capacity
        self.quarantined_nbytes = 0
        self.granted_nbytes = 0
        """Room given to writes that have not ended yet."""
        self.unlisted_nbytes = 0
        """What should lie there and was not found yet, while the directory is first listed."""
        self.has_more = False
        """Whether the last ``take`` stopped before it had looked at everything."""
        self._keys = KeyTable()
        self._lineage = Lineage(self._keys)
        self._coming: Counter[ObjectKey] = Counter()
        """What is being written: counted as granted until it is settled."""
        self._seen: dict[ObjectKey, tuple[int, int, bytes]] = {}
        """What a scan has found of it: counted when no write of it has been."""
        self._waiting = bytearray()
        """By row, whether it waits for its followers to go."""
        self._refusals = Refusals(self._lineage)
        self._rings = Rings(self._lineage)
        self._used_ns = array("q")
        self._entries = array("Q")
        """By row, which of all objects ever counted it is; 0 where there is none."""
        self._entry = 0
        self._stored_nbytes = 0
        self._shards = Shards()
        self._changed: dict[str, None] | None = {}
        """What changed since the scan under way began, or before the first."""
        self._runs: list[Run] = []

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
            self._add(key, nbytes, used_ns, write=write)
            self._note(key)
        elif write is not None and write.parent:
            row = self._keys.row(key)
            assert row is not None
            self._lineage.learn(row, write.parent)

    def _add(
        self,
        key: ObjectKey,
        nbytes: int,
        used_ns: int,
        parent: bytes = b"",
        write: Write | None = None,
    ) -> int:
        if write is None:
            row = self.order.add(hash(key), nbytes)
        else:
            parent = write.parent
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
            self._waiting.append(0)
        self._entry += 1
        self._used_ns[row], self._entries[row] = used_ns, self._entry
        has_twins = self._keys.add(key, row)
        self._shards.add(Shard.of(key), row)
        self._lineage.add(row, parent, has_twins=has_twins)
        self._stored_nbytes += nbytes
        return row

    def create(self, key: ObjectKey, nbytes: int, used_ns: int, write: Write | None = None) -> None:
        """Count a file that was just made, so none had been there: whatever is known is stale."""
        self.forget(key)
        self._add(key, nbytes, used_ns, write=write)

    def forget(self, key: ObjectKey, *, evicted: bool = False) -> None:
        """The file is gone; ``evicted``: to make room. Unknown keys are ignored."""
        row = self._keys.row(key)
        if row is not None:
            exposed = self._lineage.discard(row)
            self._keys.pop(key)
            self._stored_nbytes -= self.order.rows.nbytes[row]
            self._shards.discard(Shard.of(key), row)
            self._entries[row] = self._waiting[row] = 0
            self.order.remove(row, evicted=evicted)
            self._rejoin(exposed)
        self._note(key)  # also an unknown one: a scan under way may have seen it

    def use(self, path: Sequence[ObjectKey], stamps: Iterable[int]) -> None:
        """Record one use of a path, root first; ``stamps`` are its files' new times."""
        used: list[int] = []
        for key, used_ns in zip(path, stamps, strict=True):
            row = self._keys.row(key)
            if row is not None:
                self._used_ns[row] = max(self._used_ns[row], used_ns)
                used.append(row)
        self._rejoin(used)
        self.order.touch(used)

    # -- making room -----------------------------------------------------------------------------

    def expect(self, writes: Iterable[Write]) -> None:
        """Objects are about to be written: what comes before them stays until ``expect_no_more``.

        Else room for an object might be made at the cost of what it is of no use without.
        """
        for write in writes:
            self._coming[write.key] += 1
            self._lineage.expect(write)

    def expect_no_more(self, writes: Iterable[Write]) -> None:
        """They were written, or not."""
        for write in writes:
            self._coming[write.key] -= 1
            if not self._coming[write.key]:
                del self._coming[write.key]
                seen = self._seen.pop(write.key, None)
                if seen is not None and write.key not in self._keys:
                    self._add(write.key, *seen)
                    self._note(write.key)
            for row in self._lineage.expect_no_more(write):
                self._expose(row)

    def refuse(self, write: Write) -> None:
        """There is no room for an object, nor for what would follow it."""
        if self.order.name == PrefixLRU.name:
            self._refusals.add(write)

    def is_of_no_use(self, write: Write) -> bool:
        """Whether an object follows one that was refused and has not come since."""
        return self._refusals.is_behind(write)

    def take(self, nbytes: int, at_least: int, now: float) -> list[Victim]:
        """The next victims, enough for ``nbytes`` and ``at_least`` so many if there are.

        Never more than can be removed and accounted for without holding others up: ask again, also
        where there are none and ``has_more`` is set. They stay counted and are not named again
        until ``settle``. ``now``: Unix seconds.
        """
        victims: list[Victim] = []
        looks, self.has_more = _LOOKS, False
        while (nbytes > 0 or len(victims) < at_least) and len(victims) < _AT_ONCE:
            row = self.order.victim(now)
            if row is None:
                if victims or not self._open_ring():
                    break
                continue
            self.order.pin((row,))
            if self.order.name == PrefixLRU.name and self._lineage.is_followed(row):
                self._waiting[row] = 1
                looks -= 1
                if not looks:
                    self.has_more = True
                    break
                continue
            before = tuple(self._entries[other] for other in self._lineage.before(row))
            size, used_ns = self.order.rows.nbytes[row], self._used_ns[row]
            victims.append(Victim(self._keys.key(row), size, used_ns, self._entries[row], before))
            nbytes -= size
            for exposed in self._lineage.leave(row):
                self._expose(exposed, row)
        return victims

    def _open_ring(self) -> bool:
        """All that is left waits. Where some wait for each other, one of those need not."""
        exposed = self._rings.open(self._waiting, _LOOKS)
        self.has_more = exposed is None
        for row in exposed or ():
            self._expose(row)
        return bool(exposed)

    def _expose(self, row: int, follower: int | None = None) -> None:
        """Nothing follows a row any more: where it waited for that, it is the next to go.

        Unless it is to be kept for longer than its last ``follower``.
        """
        if not self._waiting[row]:
            return
        self._waiting[row] = 0
        order = self.order
        if follower is None or order.rank(row) <= order.rank(follower):
            order.demote(row)
        order.unpin((row,), used=False)

    def _rejoin(self, rows: Iterable[int]) -> None:
        """Those of some rows that waited are recent, whatever follows them."""
        for row in rows:
            if self._waiting[row]:
                self._waiting[row] = 0
                self.order.unpin((row,), used=False)

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
            if (row := self._row(victim)) is None:
                continue
            self._lineage.come_back(row)
            if victim.key not in others:
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
        if self._changed is None:
            self._changed = {}
        self._runs = []

    def reconcile(self, shard: Shard, present: set[str]) -> None:
        """Forget what a scan did not find in a shard."""
        for row in self._shards.rows(shard):
            key = self._keys.key(row)
            if key not in present and not self._is_newer(key):
                self.forget(key)

    def begin_run(self) -> Run:
        """For what a part of a scan found, least recently used first."""
        run = Run()
        self._runs.append(run)
        return run

    def discover(self, found: Sequence[tuple[ObjectKey, int, int, bytes]], run: Run) -> None:
        """Add the next of a run that nobody here had written: key, bytes, time of use (ns), parent.

        A file that is being written is counted already, as granted. Where it stands among the
        others is settled by ``sort``.
        """
        for key, nbytes, used_ns, parent in found:
            if key in self._keys or self._is_newer(key):
                continue
            if key in self._coming:
                self._seen[key] = (nbytes, used_ns, parent)
                continue
            row = self._add(key, nbytes, used_ns, parent)
            self.unlisted_nbytes = max(self.unlisted_nbytes - nbytes, 0)
            run.append(used_ns, row, self._entries[row])

    def by_use(self) -> Iterator[tuple[int, int, int]]:
        """What was found, and all that was used since, by time of use: for ``sort``.

        Nothing in it changes the ledger, so a thread may draw from it.
        """
        since = min((ns for run in self._runs for ns in run.first_ns), default=None)
        if since is None:
            return
        used, entries = self._used_ns, self._entries
        others = bytearray(len(entries))
        for run in self._runs:
            for _, row, _ in run:
                others[row] = 1
        rows = [
            row
            for row, is_found in enumerate(others)
            if not is_found and entries[row] and used[row] >= since
        ]
        mine = Run()
        for row in sorted(rows, key=used.__getitem__):
            mine.append(used[row], row, entries[row])
        # At one time, what was found goes first.
        yield from merge(*self._runs, mine, key=itemgetter(0))

    def sort(self, used: Iterable[tuple[int, int, int]]) -> None:
        """Put the next of ``by_use`` in order. What was used since stays as it is."""
        for used_ns, row, entry in used:
            if self._entries[row] == entry and self._used_ns[row] == used_ns:
                if self._waiting[row]:
                    self._rejoin((row,))
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
