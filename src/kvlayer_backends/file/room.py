"""Room for writes in a directory with a capacity: who gets it, and what goes for it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from time import time
from typing import TypeAlias

from kvlayer.abc.backend import Write
from kvlayer.errors import BackendError, NoRoomError
from kvlayer.identity.keys import ObjectKey
from kvlayer.runtime.offload import Offload
from kvlayer_backends.file.ledger import Ledger
from kvlayer_backends.file.objects import ObjectFiles, Outcome
from kvlayer_backends.file.options import FileOptions
from kvlayer_backends.file.paths import Paths
from kvlayer_backends.file.quarantine import keep
from kvlayer_backends.file.victims import Eviction, Victim

__all__ = ["Evicted", "Room"]

Evicted: TypeAlias = Callable[[list[tuple[ObjectKey, int]], str], None]
"""Called on the loop with what was evicted (key, bytes) and the policy's name."""

_SLACK = 16  # while a directory is listed, one part in so many of the capacity may be exceeded


class Room:
    """What the janitor's own process may write. Its ``ledger`` is there while it is in office."""

    def __init__(
        self,
        paths: Paths,
        options: FileOptions,
        *,
        files: ObjectFiles,
        pool: Offload,
        on_evicted: Evicted,
    ) -> None:
        self._paths = paths
        self._options = options
        self._files = files
        self._pool = pool
        self._on_evicted = on_evicted
        self.ledger: Ledger | None = None
        self.recovered = asyncio.Event()
        """Set while the books are complete, or nobody keeps any here."""
        self.recovered.set()
        self.making = asyncio.Lock()
        self.given_back = asyncio.Event()

    def has_room(self, nbytes: int) -> bool:
        """Whether ``grant`` would neither wait nor evict, as far as is known now."""
        if not self._options.capacity or self.ledger is None:
            return True
        return self.ledger.excess(nbytes) <= self._slack

    @property
    def _slack(self) -> int:
        """What the capacity may be exceeded by: something only while the directory is listed."""
        return 0 if self.recovered.is_set() else self._options.capacity // _SLACK

    def is_too_large(self, write: Write) -> BackendError | None:
        """Why an object could not be kept if nothing else was."""
        capacity = self._options.capacity
        if not capacity or write.nbytes <= capacity:
            return None
        return BackendError(
            f"file://: an object of {write.nbytes} bytes is larger than the capacity of "
            f"{capacity} bytes of {self._paths.root}",
            hint="raise capacity, or use smaller chunks",
        )

    async def grant(self, writes: Sequence[Write]) -> Ledger | BackendError | None:
        """Make room for some writes, all of them, and count their bytes; then ``settle`` each.

        None when nobody counts here. Waits for writes that hold all the room, and, while the
        directory is being listed, once that has used up what it may be exceeded by. Where there is
        no room for several it says so without having tried each: there may be for some.
        """
        nbytes = sum(write.nbytes for write in writes)
        if not self.has_room(nbytes):
            if len(writes) > 1 and not self.recovered.is_set():
                return self._no_room("while it is listed", nbytes)
            await self.recovered.wait()
        ledger = self.ledger
        if ledger is None:
            return None
        is_granted = False
        ledger.expect(writes)
        try:
            if self._options.capacity and ledger.excess(nbytes) > self._slack:
                if any(map(ledger.is_of_no_use, writes)):
                    return self._no_room("what comes before this found none", nbytes)
                async with self.making:
                    error = await self.make(ledger, nbytes)
                    if error is not None:
                        return error
                    ledger.granted_nbytes += nbytes
            else:
                ledger.granted_nbytes += nbytes
            is_granted = True
        finally:
            if not is_granted:
                ledger.expect_no_more(writes)
        return ledger

    def refused(self, write: Write, error: BackendError) -> None:
        """Remember a write that found no room: what follows it would serve nobody."""
        if self.ledger is not None and isinstance(error, NoRoomError):
            self.ledger.refuse(write)

    def _no_room(self, why: str, nbytes: int) -> NoRoomError:
        return NoRoomError(f"file://: no room for {nbytes} bytes in {self._paths.root}: {why}")

    def settle(self, ledger: Ledger, write: Write, used_ns: int, outcome: Outcome) -> None:
        """End a grant: the object counts if it was created, or the room is free again."""
        ledger.granted_nbytes -= write.nbytes
        if outcome.created:
            ledger.create(write.key, write.nbytes, used_ns, write)
        elif outcome.found is not None:
            ledger.add(write.key, *outcome.found, write)
        ledger.expect_no_more((write,))
        self.given_back.set()

    async def make(
        self,
        ledger: Ledger,
        nbytes: int,
        *,
        slices: int | None = None,
    ) -> BackendError | None:
        """Evict until ``nbytes`` more fit, or so many slices were removed. One call at a time."""
        spared: dict[ObjectKey, int] = {}
        candidates, has_evidence = 1, True
        try:
            while (excess := ledger.excess(nbytes)) > 0 and ledger is self.ledger and slices != 0:
                victims = ledger.take(excess, candidates, time())
                if victims:
                    eviction = await self._evict(ledger, victims, excess, spared)
                    if eviction.error is not None and not eviction.freed_nbytes:
                        return eviction.error
                    candidates = 2 * candidates if eviction.spared else 1
                    slices = None if slices is None else slices - 1
                elif ledger.has_more:
                    await asyncio.sleep(0)
                elif any(key in ledger for key in spared):
                    ledger.spare(spared)  # all are in use: the least recently used goes after all
                elif ledger.quarantined_nbytes and has_evidence:
                    has_evidence = False  # it goes before service does; what resists stays
                    ledger.quarantined_nbytes = await self._pool.run(
                        self._files.change, keep, self._paths, 0
                    )
                elif ledger.granted_nbytes:
                    self.given_back.clear()
                    await self.given_back.wait()
                else:
                    name, count = ledger.order.name, len(ledger)
                    return self._no_room(f"{name!r} gives up none of {count} objects", nbytes)
            return None
        finally:
            ledger.spare(spared)

    async def _evict(
        self, ledger: Ledger, victims: list[Victim], excess: int, spared: dict[ObjectKey, int]
    ) -> Eviction:
        # An object is spared once per call, or busy readers elsewhere could stop all eviction.
        asked = [v._replace(used_ns=-1) if v.key in spared else v for v in victims]
        eviction = Eviction()
        try:
            await self._pool.run(self._files.evict, asked, excess, eviction)
        finally:
            ledger.settle(victims, eviction)
            spared.update((victim.key, used_ns) for victim, used_ns in eviction.spared)
            if eviction.gone:
                named = [(victim.key, victim.nbytes) for victim in eviction.gone]
                self._on_evicted(named, ledger.order.name)
        return eviction
