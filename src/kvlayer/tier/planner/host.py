"""Tier 0, decided: which bytes of the slab hold what, and what to give up for more. Pure.

Two kinds of pins keep an object's bytes where they are. A *lease* belongs to a request: the object
leaves the policy's order at once, and coming back counts as a use. A *hold* belongs to a move (a
gather, a spill, a store of the same prompt) and says nothing about the object's worth: its place
in the order stays. Where the policy names a held object, it is set aside and the next one is asked
for, at most once per hold; let go, it is the first that the policy names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeGuard

from kvlayer._steps import FEW
from kvlayer.abc.policy import PolicyMaker
from kvlayer.eviction.order import EvictionOrder
from kvlayer.layout import KVGroup
from kvlayer.memory.extents import Extents
from kvlayer.payload import align
from kvlayer.retention import ORDINARY, Retention
from kvlayer.tier.planner.dead_ends import DeadEnds
from kvlayer.tier.planner.directory import Directory
from kvlayer.tier.planner.records import HostState, ObjectRecord
from kvlayer.tier.planner.strand import Held, Strand, flat

__all__ = ["HostTier"]

_SPARED = 32  # objects passed over for others: some 2 us each

_LONG = FEW  # objects of a strand: to make one, or to dissolve it, takes some 50 microseconds


class HostTier:
    """Slab offsets and eviction of one directory's objects. Pins are counted on the records.

    ``now`` is in Unix seconds: some objects are to be kept until a time.
    """

    def __init__(
        self,
        capacity: int,
        policy: PolicyMaker,
        directory: Directory,
        generations: memoryview | None = None,
        groups: Sequence[KVGroup] = (),
    ) -> None:
        """``groups``: the model's, by which some objects may be of no use without others."""
        self.extents = Extents(capacity, generations)
        self.order = EvictionOrder(policy)
        self.directory = directory
        self.pinned_nbytes = 0
        self.aside_nbytes = 0
        """Slab bytes of what the policy gives up but a move still holds: they are on their way."""
        self._records: list[ObjectRecord | None] = []
        """By row: what is ready in host memory."""
        self._filling = 0
        self._arriving: set[int] = set()
        """Rows that somebody waited for: the end of that lease belongs to their arrival."""
        self._aside: dict[int, int] = {}
        """Held, leased by no one, pinned in the order because it had named them; their turn."""
        self._turn = 0
        ends = DeadEnds(directory, groups, self.demote)
        self.dead_ends = ends if ends.may_exist else None

    def __len__(self) -> int:
        """Objects in host memory, those being filled included."""
        return len(self.order) + self._filling

    # -- room ------------------------------------------------------------------------------------

    def reserve(
        self,
        found: ObjectRecord,
        nbytes: int,
        evicted: list[ObjectRecord],
        now: float,
        *,
        keeps: Callable[[ObjectRecord], bool] | None = None,
        spares: Callable[[ObjectRecord], bool] | None = None,
    ) -> bool:
        """Make room and start filling ``found``, with one more hold. False when nothing can go.

        What had to be given up is appended to ``evicted``; it is not enough only where pinned
        objects leave no gap of that size, or where the next to go is one that ``keeps`` names.
        What ``spares`` names goes only where little else can.
        """
        if nbytes > self.extents.capacity - self.pinned_nbytes:
            return False
        spared: list[ObjectRecord] = []
        offset = self.extents.allocate(nbytes)
        while offset is None:
            victim = self.victim(now)
            if victim is not None and spares is not None and spares(victim):
                if len(spared) < _SPARED:
                    self.take(victim)
                    spared.append(victim)
                    continue
                victim = None
            if victim is None and spared:
                self.let_go(spared)
                spared, spares = [], None
                continue
            if victim is None or (keeps is not None and keeps(victim)):
                break
            self.drop(victim, evicted=True)
            evicted.append(victim)
            offset = self.extents.allocate(nbytes)
        self.let_go(spared)
        if offset is None:
            return False
        self.directory.fill(found, offset, nbytes)
        self._filling += 1
        found.pins += 1
        found.held += 1
        self.pinned_nbytes += nbytes
        return True

    def commit(self, path: Sequence[ObjectRecord]) -> None:
        """The bytes of these reserved objects are there: serve them. Keeps their pins."""
        for found in path:
            self.directory.ready(found)
            self._filling -= 1
            start = found.chunk.start
            row = found.row = self.order.add(
                hash((found.hash, found.tokens, found.part)),
                align(found.nbytes),
                first_token=max(start, 0),
                tokens=found.tokens if start >= 0 else 0,
                retention=found.retention,
            )
            if row == len(self._records):
                self._records.append(found)
            else:
                self._records[row] = found
            if found.pins > found.held:  # who waits for it counts as its arrival, not as a use
                self._arriving.add(row)
                self.order.pin((row,))
            if self.dead_ends is not None:
                self.dead_ends.came(found)

    def drop(self, found: ObjectRecord, *, evicted: bool = False) -> None:
        """Give up an object's bytes, whatever its state; pins stay and hold only the record.

        ``evicted``: to make room for others. The caller makes sure that no one uses the bytes any
        more.
        """
        if found.pins:
            self.pinned_nbytes -= found.nbytes
        row = found.row
        if row < 0:
            self._filling -= 1
        else:
            self._leave_aside(row)
            self._arriving.discard(row)
            self.order.remove(row, evicted=evicted)
            self._records[row] = None
            found.row = -1
        self.extents.release(self.directory.drop_host(found))
        if row >= 0 and self.dead_ends is not None:
            self.dead_ends.gone(found)

    def victim(self, now: float) -> ObjectRecord | None:
        """What the policy gives up next and nobody holds; None when there is no such object."""
        while (row := self.order.victim(now)) is not None:
            found = self._records[row]
            assert found is not None
            if not found.pins:
                return found
            self._set_aside(found)
        return None

    # -- pins ------------------------------------------------------------------------------------

    def pin(self, path: Sequence[ObjectRecord]) -> int:
        """Lease these objects, host-resident or not; a pin on an absent one holds its record.

        Returns the bytes that are in host memory.
        """
        rows: list[int] = []
        absent, nbytes, known = HostState.ABSENT, 0, self.pinned_nbytes
        for found in path:
            pins = found.pins = found.pins + 1
            if found.host is absent:
                continue
            nbytes += found.nbytes
            if pins == 1:
                known += found.nbytes
            if pins - found.held == 1 and (row := found.row) >= 0:
                rows.append(row)
        self.pinned_nbytes = known
        if self._aside:
            rows = [row for row in rows if not self._leave_aside(row)]
        self.order.pin(rows)
        return nbytes

    def unpin(self, path: Sequence[ObjectRecord]) -> None:
        """Let go of one lease on each, root first; counts as one use of the path."""
        self._used(self._taken_back(path))

    def _taken_back(self, path: Sequence[ObjectRecord]) -> list[int]:
        """Take one pin of each; the rows of those that nobody leases any more."""
        rows: list[int] = []
        for found in path:
            pins = found.pins = found.pins - 1
            if not pins:
                self._is_free(found)
            if pins == found.held and (row := found.row) >= 0:
                rows.append(row)
        return rows

    def _used(self, rows: Sequence[int]) -> None:
        """Nobody leases these any more."""
        if not self._arriving or self._arriving.isdisjoint(rows):
            self.order.unpin(rows, used=True)
            return
        used = [row for row in rows if row not in self._arriving]
        self._arriving.difference_update(rows)
        self.order.unpin(rows, used=False)
        self.order.touch(used)
        self.order.refresh(rows)

    # -- strands ---------------------------------------------------------------------------------

    @staticmethod
    def string(first: Sequence[Held]) -> list[Held]:
        """Make strands of what is ready and in none, of consecutive full chunks; the same path.

        What shorter prompts have parted is joined again while nobody leases it.
        """
        held, alone = list[Held](), list[ObjectRecord]()
        for each in _as_they_are(first):
            if isinstance(each, ObjectRecord) and _may_be_strung(each):
                alone.append(each)
                continue
            _string(alone, held)
            if isinstance(each, Strand) and held and _may_join(held[-1], each):
                each.dissolve()
                held[-1] = held[-1].extended(each.records)
            else:
                held.append(each)
        _string(alone, held)
        return held

    def lease(self, first: Sequence[Held], rest: Sequence[ObjectRecord]) -> tuple[list[Held], int]:
        """Lease a path, root first. What of ``first`` is ready and in no strand becomes one.

        ``first``: consecutive full chunks. Returns what :meth:`unlease` takes, and the bytes that
        are in host memory.
        """
        held = self.string(first)
        held += rest
        nbytes = self.pin([each for each in held if isinstance(each, ObjectRecord)])
        for each in held:
            if isinstance(each, Strand):
                nbytes += self._pin(each)
        return held, nbytes

    def _pin(self, strand: Strand) -> int:
        """Lease a strand; the bytes of it."""
        if strand.own:  # some of it is leased or held by itself
            rows: list[int] = []
            for found in strand.records:
                if found.pins == 0:
                    self.pinned_nbytes += found.nbytes
                if found.pins == found.held and not self._leave_aside(found.row):
                    rows.append(found.row)
            self.order.pin(rows)
        elif not strand.leases:
            self.pinned_nbytes += strand.nbytes
            self.order.pin(strand.rows)
        strand.leases += 1
        return strand.nbytes

    def unlease(self, held: Sequence[Held]) -> None:
        """Let go of what :meth:`lease` has leased; counts as one use of the path."""
        if len(held) == 1 and isinstance(held[0], Strand):
            self._used(self._unpinned(held[0]))
            return
        rows: list[int] = []
        for each in held:
            if isinstance(each, Strand):
                rows += self._unpinned(each)
            else:
                rows += self._taken_back((each,))
        self._used(rows)

    def _unpinned(self, strand: Strand) -> Sequence[int]:
        if strand.parts:
            return [row for part in strand.parts for row in self._unpinned(part)]
        if strand.is_dissolved:
            return self._taken_back(strand.records)
        strand.leases -= 1
        if not strand.own:
            if strand.leases:
                return []
            self.pinned_nbytes -= strand.nbytes
            return strand.rows
        rows: list[int] = []
        for found in strand.records:
            if found.pins == 0:
                self._is_free(found)
            if found.pins == found.held:
                rows.append(found.row)
        return rows

    def taken_apart(self, held: Sequence[Held]) -> list[ObjectRecord]:
        """One lease of a path as pins of its objects, which can be let go of one by one."""
        for each in held:
            if isinstance(each, Strand):
                self._take_apart(each)
        return flat(held)

    def _take_apart(self, strand: Strand) -> None:
        if strand.parts:
            for part in strand.parts:
                self._take_apart(part)
        elif not strand.is_dissolved:
            strand.lend_pin()

    # -- holds -----------------------------------------------------------------------------------

    def hold(self, path: Sequence[ObjectRecord]) -> None:
        """Keep these objects for a move, host-resident or not."""
        for found in path:
            found.pins += 1
            found.held += 1
            if found.pins == 1 and found.host is not HostState.ABSENT:
                self.pinned_nbytes += found.nbytes

    def let_go(self, path: Sequence[ObjectRecord]) -> None:
        """Let go of one hold on each: they are as they would be without it."""
        back: list[tuple[int, int]] = []
        for found in path:
            found.held -= 1
            found.pins -= 1
            if not found.pins:
                self._is_free(found)
            if not found.held and (turn := self._leave_aside(found.row)):
                back.append((turn, found.row))
        for _, row in sorted(back):  # as the policy had named them
            self.order.demote(row)
            self.order.unpin((row,), used=False)

    def _is_free(self, found: ObjectRecord) -> None:
        """Its last pin was taken back."""
        if found.host is not HostState.ABSENT:
            self.pinned_nbytes -= found.nbytes
        else:
            self.directory.forget(found)

    def refresh(self, path: Sequence[ObjectRecord], retention: Retention = ORDINARY) -> None:
        """A prompt (root first) was stored, or stored again: its objects are recent now."""
        if retention is not ORDINARY:
            for found in path:
                found.retention = found.retention.joined(retention)
        self.order.refresh([found.row for found in path if found.row >= 0], retention)

    def demote(self, found: ObjectRecord) -> None:
        """Give this one up before all others, if it is in host memory."""
        if found.row >= 0:
            self.order.demote(found.row)

    # -- set aside -------------------------------------------------------------------------------

    def take(self, found: ObjectRecord) -> None:
        """Hold the victim: it is on its way out, and the policy names others meanwhile."""
        self.hold((found,))
        self._set_aside(found)

    def is_leaving(self, found: ObjectRecord) -> bool:
        """Whether it was given up and no request has used it since."""
        return found.row in self._aside

    def _set_aside(self, found: ObjectRecord) -> None:
        self.order.pin((found.row,))
        self._turn += 1
        self._aside[found.row] = self._turn
        self.aside_nbytes += align(found.nbytes)

    def _leave_aside(self, row: int) -> int:
        """It is wanted, free or gone: its turn, or 0. The order still has it pinned."""
        turn = self._aside.pop(row, 0)
        if turn:
            self.aside_nbytes -= self.order.rows.nbytes[row]
        return turn


def _as_they_are(path: Sequence[Held]) -> Iterator[Held]:
    """A path that may have been found a while ago: strands that are still some."""
    for each in path:
        if isinstance(each, Strand) and each.parts:
            yield from _as_they_are(each.parts)
        elif isinstance(each, Strand) and each.is_dissolved:
            yield from each.records
        else:
            yield each


def _may_be_strung(found: ObjectRecord) -> bool:
    return found.row >= 0 and found.strand is None and found.chunk is found


def _may_join(before: Held, strand: Strand) -> TypeGuard[Strand]:
    """Whether two strands that follow each other may be one."""
    if not isinstance(before, Strand) or before.leases or strand.leases:
        return False
    return len(before) + len(strand) <= _LONG


def _string(alone: list[ObjectRecord], held: list[Held]) -> None:
    """Make strands of objects that follow what is ``held``, or let the last one go on."""
    before = held[-1] if held else None
    if alone and isinstance(before, Strand) and not before.leases and len(before) < _LONG:
        held[-1] = before.extended(alone[: _LONG - len(before)])
        del alone[: _LONG - len(before)]
    for at in range(0, len(alone), _LONG):
        some = alone[at : at + _LONG]
        held.append(Strand(some) if len(some) > 1 else some[0])
    alone.clear()
