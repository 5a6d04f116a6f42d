"""What a tier lists, read in batches: a listing that breaks its contract costs nobody a hang."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from functools import partial
from typing import NamedTuple

from kvlayer.abc.backend import Listed
from kvlayer.errors import ForeignError
from kvlayer.identity.keys import ObjectKey
from kvlayer.runtime.foreign import bounded
from kvlayer.tier.planner.copies import copy_of
from kvlayer.tier.tier import LowerTier
from kvlayer.tier.transfer.named import ListedAs

__all__ = ["listed"]

_BATCH = 256
_MAX_REPEATED = 1000  # an object may move while it is listed; a listing that goes round never ends


class Batch(NamedTuple):
    """Some of what a tier lists: keys, and for each how the object lies there.

    See :mod:`kvlayer.tier.planner.copies`.
    """

    keys: list[ObjectKey]
    copies: list[int]


async def listed(tier: LowerTier, prefix: str) -> AsyncGenerator[Batch]:
    """What a tier lists under ``prefix``, in batches. Each step has the tier's deadline.

    Raises ``TimeoutError`` when a step takes longer, ``ForeignError`` for what is no listing or
    none that ends, and what the backend raises; what was listed until then is yielded first.
    """
    reader = _Reader(tier, prefix)
    while not reader.is_over:
        batch = Batch([], [])
        error: Exception | None = None
        try:
            await bounded(partial(reader.read, batch), tier.guard.deadline)
        except Exception as exc:  # noqa: BLE001  # foreign code: raised below
            error = exc
        if batch.keys:
            yield batch
        if error is not None:
            raise error


class _Reader:
    """One listing. Cycles are found as R. Brent does (BIT 20, 1980): in constant memory."""

    def __init__(self, tier: LowerTier, prefix: str) -> None:
        self._tier = tier
        self._prefix = prefix
        self._listing: AsyncIterator[object] | None = None
        self._count = 0
        self._anchor: ObjectKey | None = None
        self._repeated = 0
        self.is_over = False

    async def read(self, batch: Batch) -> None:
        """Append the next keys to ``batch``: fewer where they come slowly, each in its time."""
        loop = asyncio.get_running_loop()
        if self._listing is None:
            self._listing = aiter(self._tier.backend.list(self._prefix))
        until = loop.time() + self._tier.guard.deadline / 4
        for _ in range(_BATCH):
            try:
                entry = await anext(self._listing)
            except StopAsyncIteration:
                self.is_over = True
                return
            key = self._checked(entry)
            if key is not None and isinstance(entry, Listed):
                encoding = entry.encoding if isinstance(entry, ListedAs) else 0
                batch.keys.append(key)
                batch.copies.append(copy_of(encoding, entry.nbytes))
            if loop.time() > until:
                return

    def _checked(self, entry: object) -> ObjectKey | None:
        key: object = entry.key if isinstance(entry, Listed) else None
        if not isinstance(key, ObjectKey):
            raise ForeignError(f"listed {type(entry).__name__}, expected Listed with a key")
        is_asked = key.startswith(self._prefix)
        if key == self._anchor or not is_asked:
            self._repeated += 1
            if self._repeated > _MAX_REPEATED:
                raise ForeignError(
                    f"a listing of {self._count} keys that repeats itself or names others than "
                    f"those under {self._prefix!r}"
                )
        self._count += 1
        if not self._count & (self._count - 1):
            self._anchor = key
        return key if is_asked else None
