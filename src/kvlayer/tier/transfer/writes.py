"""What one tier has still to get, in the order it came, root before leaf."""

from __future__ import annotations

import asyncio
from typing import NamedTuple

from kvlayer.identity.keys import ObjectKey, Span
from kvlayer.tier.guard.guard import TierCall
from kvlayer.tier.messages import Outcome
from kvlayer.tier.planner.records import HostState, ObjectRecord
from kvlayer.tier.tier import LowerTier

__all__ = ["Unwritten", "Write", "WriteQueue"]


class Unwritten(NamedTuple):
    """What a tier has not got yet of what it should have."""

    tier: str
    objects: int
    nbytes: int


class Write:
    """One object on its way down to one tier: queued, then running, then ended."""

    __slots__ = ("call", "ended", "is_withdrawn", "key", "number", "outcome", "record", "request",
                 "span", "tier")  # fmt: skip

    def __init__(self, span: Span, record: ObjectRecord, tier: LowerTier, number: int = 0) -> None:
        self.number = number
        """Its place in the queue."""
        self.span = span
        self.record = record
        self.key = record.key
        self.tier = tier
        self.request = tier.emit.current
        """Whose store it is part of, as events say."""
        self.call: TierCall[Outcome] | None = None
        """Since its turn has come."""
        self.outcome: Outcome | None = None
        self.is_withdrawn = False
        """Its object is being removed: it is not tried again."""
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    @property
    def is_running(self) -> bool:
        return self.call is not None and self.outcome is None

    @property
    def is_lost(self) -> bool:
        """Whether there is nothing left to be written."""
        return self.record.host is HostState.ABSENT

    def end(self, outcome: Outcome) -> None:
        """It is over, in whatever way."""
        self.outcome = outcome
        if not self.ended.done():
            self.ended.set_result(None)


class WriteQueue:
    """What one tier is to get, in the order it came; ``news`` ends when something changes."""

    def __init__(self, tier: LowerTier) -> None:
        self.tier = tier
        self.waiting: dict[ObjectKey, Write] = {}
        self.running: dict[ObjectKey, Write] = {}
        self.timer: asyncio.TimerHandle | None = None
        self.is_pumping = False
        self.count = 0
        """Writes queued so far."""
        self.watchers: dict[asyncio.Future[None], None] = {}

    def find(self, key: ObjectKey) -> Write | None:
        return self.running.get(key) or self.waiting.get(key)

    def wait_again(self, write: Write) -> None:
        """It keeps the place it had."""
        write.call = None
        waiting = [write, *self.waiting.values()]
        self.waiting = {w.key: w for w in sorted(waiting, key=lambda w: w.number)}

    def changed(self) -> None:
        """Tell whoever watches that a write has begun or ended, or that none can."""
        if not self.watchers:
            return
        watchers, self.watchers = self.watchers, {}
        for watcher in watchers:
            if not watcher.done():
                watcher.set_result(None)

    def watch(self) -> asyncio.Future[None]:
        """Done with the next change from now on."""
        watcher: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.watchers[watcher] = None
        return watcher

    async def change(self, seconds: float | None) -> bool:
        """Wait for the next change; False when there was none for so long."""
        watcher = self.watch()
        try:
            done, _ = await asyncio.wait({watcher}, timeout=seconds)
        finally:
            self.watchers.pop(watcher, None)
        return bool(done)
