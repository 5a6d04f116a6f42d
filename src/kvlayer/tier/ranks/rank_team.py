"""The engine's ranks as the planner's process sees them: orders go out, completions come back.

Each rank carries its orders out in a process of its own (:mod:`kvlayer.api.rank_worker`); how the
bytes of a message get there is the engine's business.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from threading import Condition
from typing import Any, Self

from kvlayer._values import items, waiting, whole
from kvlayer.abc.stager import Landed
from kvlayer.errors import ClosedError, LayoutError, MessageError
from kvlayer.layout import KVLayout, KVView
from kvlayer.memory.slab import Slab
from kvlayer.results import Cause
from kvlayer.tier.messages import (
    MAX_PIECES,
    Completion,
    Greeting,
    Order,
    Outcome,
    Piece,
    Verb,
)
from kvlayer.tier.planner import plan
from kvlayer.tier.ranks.tally import Tally, shares
from kvlayer.tier.transfer.device import Device

__all__ = ["RankDevice", "RankTeam", "RemoteView"]

_SLICE = 32  # pieces of which the orders are made in one turn of the loop


@dataclass(frozen=True, slots=True)
class RemoteView(KVView):
    """A view whose tensors are in the ranks' processes: its slots, and the engine's name for it.

    The name goes into the orders, so that a rank finds the tensors and slots that are meant. What
    :class:`KVView` says of memory holds for the ranks' tensors. Make one with :meth:`of`.
    """

    name: str = ""

    @classmethod
    def of(cls, name: str, *slots: Any) -> Self:
        """``slots`` as in ``KVView``, for each KV group; -1 where the engine has let a token go."""
        return cls((), slots, name=name)


@dataclass(slots=True, eq=False)
class _Move:
    """One gather or scatter of several ranks, while it runs."""

    tally: Tally
    loop: asyncio.AbstractEventLoop
    done: asyncio.Future[None]


class RankTeam:
    """Orders for the ranks of one engine, and their answers. Thread-safe.

    Give it to ``Cache.open`` or ``Portal.open``, whose layout is then that of all ranks together,
    and whose views are :class:`RemoteView`. The engine sends what :meth:`take` returns to the ranks
    and hands what they answer to :meth:`complete`.

    Nothing here has a deadline: memory that a rank may still write to is not used again before it
    has answered. For a rank that has died there is :meth:`lost`.
    """

    def __init__(self, layouts: Sequence[KVLayout]) -> None:
        self.layouts = items("layouts", layouts, KVLayout, hint="a KVLayout for each rank")
        """Rank r's own, in the order of their numbers."""
        self._parts = [
            [plan.rank_part(i, held) for i, held in enumerate(layout.groups)]
            for layout in self.layouts
        ]
        self._changed = Condition()
        """Guards what follows."""
        self._outbox: dict[int, Order] = {}
        """What nobody took yet, by number."""
        self._open: dict[int, tuple[Order, _Move]] = {}
        self._messages: dict[int, bytes] = {}
        """Of the open orders, by number."""
        self._down: dict[int, str] = {}
        self._next = 1
        self._slab: Slab | None = None

    def __len__(self) -> int:
        return len(self.layouts)

    # -- for the engine, in any thread -------------------------------------------------------------

    def greeting(self) -> bytes:
        """What every rank needs to join: see ``Rank.open``. While the cache is open.

        Raises ``ClosedError``, and ``UnsupportedError`` where host memory cannot be shared.
        """
        if self._slab is None:
            raise ClosedError(
                "there is no slab to join", hint="open a cache with these ranks first"
            )
        held = tuple(plan.described(layout) for layout in self.layouts)
        return Greeting(self._slab.handle, held).to_bytes()

    def take(self, seconds: float | None = 0.0) -> list[Order]:
        """Orders that nobody took yet; waits at most ``seconds`` for the first of them.

        None: without a limit. The engine now owes each of them a completion, or :meth:`lost`.
        """
        seconds = waiting("seconds", seconds)
        with self._changed:
            self._changed.wait_for(lambda: self._outbox, seconds)
            taken = [*self._outbox.values()]
            self._outbox.clear()
            return taken

    def message(self, order: Order) -> bytes:
        """``order.to_bytes()`` of one that was taken. At once: it was made on the cache's loop.

        For hundreds of objects that is the most that an order costs, and who takes may be in haste.
        """
        with self._changed:
            known = self._messages.get(order.number)
        return order.to_bytes() if known is None else known

    def complete(self, packed: bytes) -> None:
        """A rank has answered. What comes too late, after :meth:`lost` or closing, is ignored.

        Raises ``MessageError`` for what is no answer to an order.
        """
        answer = Completion.from_bytes(packed)
        with self._changed:
            order, move = self._open.get(answer.number, (None, None))
            if order is None or move is None:
                if answer.number < self._next:
                    return
                raise MessageError(f"there never was an order {answer.number}")
            if answer.number in self._outbox:  # what moves then would move into others' memory
                raise MessageError(
                    f"order {answer.number} was not sent to anybody yet",
                    hint="send each completion once, as the rank made it",
                )
            if answer.rank != order.rank or answer.asked != len(order.pieces):
                raise MessageError(
                    f"rank {answer.rank} does not answer what order {answer.number} asked of "
                    f"rank {order.rank}",
                    hint="send each completion once, as the rank made it",
                )
            self._settle(order, answer.outcomes(order.pieces))

    def lost(self, rank: int, detail: str) -> None:
        """A rank has died: what it was asked fails, and so will what it would be asked.

        Only once it writes no more: the memory it was lent is used again from now on. Raises
        ``ArgumentError`` for what is no rank's number.
        """
        rank = self._number(rank)
        with self._changed:
            self._down[rank] = detail
            self._fail([order for order, _ in self._open.values() if order.rank == rank], detail)

    def joined(self, rank: int) -> None:
        """A rank is there (again): it gets orders. Raises ``ArgumentError`` as :meth:`lost`."""
        rank = self._number(rank)
        with self._changed:
            self._down.pop(rank, None)

    def _number(self, rank: int) -> int:
        return whole("rank", rank, most=len(self) - 1)

    # -- for the cache -----------------------------------------------------------------------------

    def open(self, slab: Slab) -> None:
        """The cache is open, with this slab."""
        with self._changed:
            self._slab = slab
            self._down.clear()

    def close(self) -> None:
        """The cache closes: nothing that ranks still do reaches anyone. Idempotent."""
        with self._changed:
            self._slab = None
            self._down = dict.fromkeys(range(len(self)), "the cache is closed")
            self._fail([order for order, _ in self._open.values()], "the cache is closed")

    async def move(
        self, verb: Verb, view: str, start: int, stop: int, pieces: Sequence[Piece]
    ) -> list[Outcome]:
        """Have every rank move its share of ``pieces``; returns what was missed by any of them.

        Cancelled, it takes back what nobody took yet and returns once the ranks have answered the
        rest: until then the slots are theirs.
        """
        loop = asyncio.get_running_loop()
        shared = shares(verb, pieces, self._parts)
        moving = _Move(Tally(pieces, shared), loop, loop.create_future())
        orders = [
            self._numbered(Order(0, rank, verb, view, start, stop, tuple(some)))
            for rank, its in shared.items()
            for some in _batches(its)
        ]
        messages: list[bytes] = []
        for order in orders:
            if len(pieces) > _SLICE:
                await asyncio.sleep(0)
            messages.append(order.to_bytes())
        with self._changed:
            down = next((self._down[rank] for rank in shared if rank in self._down), None)
            if down is not None:  # what the others moved would be of no use
                return [Outcome(piece.key, Cause.RANK_DOWN, down) for piece in pieces]
            for order, message in zip(orders, messages, strict=True):
                self._post(moving, order, message)
            if moving.tally.is_done:
                return moving.tally.missed()
            self._changed.notify_all()
        cancelled = False
        while not moving.done.done():
            try:
                await asyncio.wait({moving.done})
            except asyncio.CancelledError:
                cancelled = True
                self._withdraw(orders)
        if cancelled:
            raise asyncio.CancelledError
        return moving.tally.missed()

    def _numbered(self, order: Order) -> Order:
        with self._changed:
            self._next += 1
            return order._replace(number=self._next - 1)

    def _post(self, moving: _Move, order: Order, message: bytes) -> None:
        self._open[order.number] = order, moving
        self._messages[order.number] = message
        self._outbox[order.number] = order

    def _withdraw(self, orders: Sequence[Order]) -> None:
        with self._changed:
            self._fail([order for order in orders if order.number in self._outbox], "given up")

    def _fail(self, orders: Sequence[Order], detail: str) -> None:
        for order in orders:
            self._outbox.pop(order.number, None)
            answer = Completion.failed(order, detail)
            self._settle(order, answer.outcomes(order.pieces))

    def _settle(self, order: Order, outcomes: Sequence[Outcome]) -> None:
        _, moving = self._open.pop(order.number)
        del self._messages[order.number]
        moving.tally.report(order.rank, outcomes)
        if moving.tally.is_done:
            with suppress(RuntimeError):  # the loop is gone, and with it who waited
                moving.loop.call_soon_threadsafe(partial(_answer, moving.done))


def _answer(done: asyncio.Future[None]) -> None:
    if not done.done():
        done.set_result(None)


def _batches(pieces: Sequence[Piece]) -> Iterator[Sequence[Piece]]:
    return (pieces[at : at + MAX_PIECES] for at in range(0, len(pieces), MAX_PIECES))


class RankDevice(Device):
    """A device that is elsewhere: the ranks gather and scatter. ``slab`` is what they map."""

    def __init__(self, ranks: RankTeam, slab: Slab) -> None:
        self._ranks = ranks
        ranks.open(slab)

    def check(self, view: KVView) -> None:
        if not isinstance(view, RemoteView):
            raise LayoutError(
                f"expected a RemoteView, found a {type(view).__name__}",
                hint="this cache plans for ranks in other processes: RemoteView.of(name, slots)",
            )

    async def gather(
        self, view: KVView, pieces: Sequence[Piece], view_start: int
    ) -> Sequence[Outcome]:
        return await self._move(Verb.GATHER, view, pieces, view_start, view_start + view.num_tokens)

    async def scatter(
        self,
        view: KVView,
        pieces: Sequence[Piece],
        view_start: int,
        view_stop: int,
        landed: Landed | None = None,
    ) -> Sequence[Outcome]:
        """As ``Device.scatter``. ``landed`` is not told: an order is answered as a whole."""
        return await self._move(Verb.SCATTER, view, pieces, view_start, view_stop)

    async def _move(
        self, verb: Verb, view: KVView, pieces: Sequence[Piece], start: int, stop: int
    ) -> Sequence[Outcome]:
        self.check(view)
        assert isinstance(view, RemoteView)
        return await self._ranks.move(verb, view.name, start, stop, pieces)

    def close(self) -> None:
        self._ranks.close()
