"""Room for writes in a directory with a capacity: who gets it, and what goes for it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from time import time
from typing import TypeAlias

from kvlayer._offload import Offload
from kvlayer.abc.backend import Write
from kvlayer.errors import BackendError, NoRoomError
from kvlayer.keys import ObjectKey
from kvlayer_backends.file.ledger import Eviction, Ledger, Victim
from kvlayer_backends.file.objects import ObjectFiles, Outcome
from kvlayer_backends.file.options import FileOptions
from kvlayer_backends.file.paths import Paths
from kvlayer_backends.file.quarantine import keep

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

    async def grant(self, write: Write) -> Ledger | BackendError | None:
        """Make room for a write and count its bytes; give the answer to ``settle``.

        None when nobody counts here. Waits for writes that hold all the room, and, while the
        directory is being listed, once that has used up what it may be exceeded by.
        """
        capacity, nbytes = self._options.capacity, write.nbytes
        if capacity and nbytes > capacity:
            return BackendError(
                f"file://: an object of {nbytes} bytes is larger than the capacity of "
                f"{capacity} bytes of {self._paths.root}",
                hint="raise capacity, or use smaller chunks",
            )
        if not self.has_room(nbytes):
            await self.recovered.wait()
        ledger = self.ledger
        if ledger is None:
            return None
        if capacity and ledger.excess(nbytes) > self._slack:
            async with self.making:
                error = await self.make(ledger, nbytes, write)
                if error is not None:
                    return error
                ledger.granted_nbytes += nbytes
        else:
            ledger.granted_nbytes += nbytes
        return ledger

    def settle(self, ledger: Ledger, write: Write, used_ns: int, outcome: Outcome) -> None:
        """End a grant: the object counts if it was created, or the room is free again."""
        ledger.granted_nbytes -= write.nbytes
        if outcome.created:
            ledger.create(write.key, write.nbytes, used_ns, write)
        elif outcome.found is not None:
            ledger.add(write.key, *outcome.found, write)
        self.given_back.set()

    async def make(
        self,
        ledger: Ledger,
        nbytes: int,
        write: Write | None = None,
        *,
        slices: int | None = None,
    ) -> BackendError | None:
        """Evict until ``nbytes`` more fit, or so many slices were removed. One call at a time."""
        spared: dict[ObjectKey, int] = {}
        candidates = 1
        try:
            while (excess := ledger.excess(nbytes)) > 0 and ledger is self.ledger:
                if slices is not None:
                    if slices == 0:
                        break
                    slices -= 1
                victims = ledger.take(excess, candidates, time(), write)
                if victims:
                    eviction = await self._evict(ledger, victims, excess, spared)
                    if eviction.error is not None and not eviction.freed_nbytes:
                        return eviction.error
                    candidates = 2 * candidates if eviction.spared else 1
                elif any(key in ledger for key in spared):
                    ledger.spare(spared)  # all are in use: the least recently used goes after all
                elif ledger.quarantined_nbytes:  # evidence never stands in the way of service
                    ledger.quarantined_nbytes = await self._pool.run(
                        self._files.change, keep, self._paths, 0
                    )
                elif ledger.granted_nbytes:
                    self.given_back.clear()
                    await self.given_back.wait()
                else:
                    return NoRoomError(
                        f"file://: no room in {self._paths.root}: "
                        f"{ledger.order.name!r} gives up none of {len(ledger)} objects for this"
                    )
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
