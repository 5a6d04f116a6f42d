"""Removing objects from tiers by request: in batches, each with the tier's deadline, all accounted.

Whoever erases KV must know what is left of it: what could not be removed is an error.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import partial

from kvlayer.errors import BackendError
from kvlayer.identity.keys import ObjectKey
from kvlayer.results import Cause
from kvlayer.runtime.foreign import words
from kvlayer.tier.guard.guard import Guard, Refused
from kvlayer.tier.planner.planner import Planner
from kvlayer.tier.tier import LowerTier
from kvlayer.tier.transfer.objects import Objects

__all__ = ["Removal"]

_FIRST_BATCH = 16
_MAX_BATCH = 256
_SLICE = 64  # objects forgotten in one turn of the loop: some 10 us each
_QUICK = 1 / 16
"""A batch that took less of the deadline is followed by one twice as large."""


class Removal:
    """One request's: it goes on past a tier that fails, and says in the end what is left where."""

    def __init__(self, planner: Planner, objects: Objects) -> None:
        self._planner = planner
        self._objects = objects
        self._troubles: list[str] = []
        self.gone = 0
        """Objects that went, from every tier."""

    def unseen(self, tier: LowerTier, why: str) -> None:
        """A tier did not say what it holds, so more may be left there."""
        self._troubles.append(f"{tier.name} did not say what it holds: {why}")

    def being_written(self, tier: LowerTier, count: int) -> None:
        """So many objects are being written to a tier, which does not get done with it."""
        if count:
            self._troubles.append(f"{count} objects are still being written to {tier.name}")

    async def delete(self, tier: LowerTier, keys: Sequence[ObjectKey]) -> None:
        """Remove objects from a tier."""
        loop, size, at, left = asyncio.get_running_loop(), _FIRST_BATCH, 0, 0
        why = ""
        while at < len(keys):
            batch, began = keys[at : at + size], loop.time()
            errors, answers = await self._batch(tier, batch)
            at += len(batch)
            left += len(errors)
            why = why or next(iter(errors), "")
            if not answers:  # it does not answer: the rest would cost a deadline each
                left += len(keys) - at
                break
            quick = loop.time() - began < _QUICK * tier.guard.deadline
            size = min(2 * size, _MAX_BATCH) if quick else max(size // 2, 1)
        if left:
            self._troubles.append(f"{left} of {len(keys)} objects are left in {tier.name}: {why}")

    async def _batch(self, tier: LowerTier, keys: Sequence[ObjectKey]) -> tuple[list[str], bool]:
        """The errors of a batch, and whether the tier answered at all."""
        guard: Guard = tier.guard
        try:
            call = guard.start(partial(self._objects.delete, tier.index, keys))
        except Refused as no:
            tier.refused(no.cause)
            return [no.detail] * len(keys), False
        why = f"not deleted within {guard.deadline} s"
        if not await guard.wait_alone(call):
            tier.fails(Cause.DEADLINE, why)
            return [why] * len(keys), False
        if call.error is not None:
            why = words(call.error)
            tier.fails(Cause.TIER_DOWN, why)
            return [why] * len(keys), False
        answers = call.result()
        errors = [words(error) for error in answers if error is not None]
        if errors:
            detail = f"{len(errors)} objects were not deleted: {errors[0]}"
            tier.complains(Cause.TIER_DOWN, detail)
        gone = [key for key, error in zip(keys, answers, strict=True) if error is None]
        for at in range(0, len(gone), _SLICE):
            some = gone[at : at + _SLICE]
            self._planner.vanished(some, tier.index, "removed by request", Cause.CLEARED)
            await asyncio.sleep(0)
        tier.removed(gone)
        self.gone += len(gone)
        return errors, True

    def check(self) -> None:
        """Raise ``BackendError`` when something is left that was to be removed."""
        if self._troubles:
            raise BackendError(
                f"{self.gone} objects were removed, but {'; '.join(self._troubles)}",
                hint="ask again once the tier answers; doctor says what is wrong with a directory",
            )
