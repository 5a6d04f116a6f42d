"""The device half of moving: payloads between an engine's tensors and the slab. Decides nothing.

A device is this process's own, driven by a stager, or in the ranks' processes
(:class:`~kvlayer.tier.ranks.rank_team.RankDevice`). Objects come as
:class:`~kvlayer.tier.messages.Piece`.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

from kvlayer._steps import Steps
from kvlayer.abc.stager import HostCopy, Landed, Stager
from kvlayer.identity.keys import Part
from kvlayer.layout import KVView
from kvlayer.memory.slab import Slab
from kvlayer.payload import Payload
from kvlayer.runtime.turns import in_turns
from kvlayer.tier.messages import Outcome, Piece, Slot

__all__ = ["Device", "LocalDevice"]

_SLICE = 32  # copies described in one turn of the loop: some 5 us each


class Device(ABC):
    """Copies objects between engine and slab. The planner says who may touch what of the slab."""

    @abstractmethod
    def check(self, view: KVView) -> None:
        """Raise ``LayoutError`` unless the view is what the layout promises."""

    @abstractmethod
    async def gather(
        self, view: KVView, pieces: Sequence[Piece], view_start: int
    ) -> Sequence[Outcome]:
        """Copy objects out of the engine; entry 0 of the view is token ``view_start``.

        Returns the outcomes of what was missed: nothing, where the device is this process's own
        and failing raises.
        """

    @abstractmethod
    async def scatter(
        self,
        view: KVView,
        pieces: Sequence[Piece],
        view_start: int,
        view_stop: int,
        landed: Landed | None = None,
    ) -> Sequence[Outcome]:
        """Copy objects into the engine, as far as the view covers their tokens.

        With ``landed`` layer after layer, where the device can; it is told of each.

        Returns the outcomes of what was missed, as :meth:`gather` does.
        """

    def close(self) -> None:
        """Let go of what was opened with it. The stager is the caller's. Idempotent."""


class LocalDevice(Device):
    """The device of this process: ``stager`` moves, ``shape`` says what an object looks like."""

    def __init__(self, slab: Slab, stager: Stager, shape: Callable[[Part, int], Payload]) -> None:
        self._slab = slab
        self._stager = stager
        self._shape = shape

    def check(self, view: KVView) -> None:
        self._stager.check(view)

    async def gather(
        self, view: KVView, pieces: Sequence[Piece | Slot], view_start: int
    ) -> Sequence[Outcome]:
        copies: list[HostCopy] = []
        for at, piece in enumerate(pieces):
            if at and not at % _SLICE:
                await asyncio.sleep(0)
            copies.append(self._copy(piece, view_start, 0))
        await self._stager.gather(view, copies)
        return ()

    async def scatter(
        self,
        view: KVView,
        pieces: Sequence[Piece | Slot],
        view_start: int,
        view_stop: int,
        landed: Landed | None = None,
    ) -> Sequence[Outcome]:
        copies = await in_turns(self._copies(pieces, view_start, view_stop))
        if copies and landed is not None:
            await self._stager.scatter_layers(view, copies, landed)
        elif copies:
            await self._stager.scatter(view, copies)
        return ()

    def _copies(
        self, pieces: Sequence[Piece | Slot], view_start: int, view_stop: int
    ) -> Steps[list[HostCopy]]:
        copies: list[HostCopy] = []
        for at, piece in enumerate(pieces):
            if at and not at % _SLICE:
                yield
            skip = max(view_start - piece.first_token, 0)
            stop = min(piece.first_token + piece.num_tokens, view_stop)
            tokens = stop - piece.first_token - skip
            if tokens > 0:
                copies.append(self._copy(piece, view_start, skip, tokens))
        return copies

    def _copy(
        self, piece: Piece | Slot, start: int, skip: int, tokens: int | None = None
    ) -> HostCopy:
        payload = self._shape(piece.part, piece.num_tokens)
        host = self._slab.view(piece.offset, payload.nbytes)
        count = payload.tokens if tokens is None else tokens
        return HostCopy(payload, host, piece.first_token + skip - start, count, skip)
