"""One rank of an engine in a process of its own: its tensors and the shared slab, no planner.

The planner's process sends orders (:mod:`kvlayer.tier.ranks.rank_team`); bytes in, bytes out, by
whatever transport the engine has.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from itertools import zip_longest
from typing import Self

from kvlayer.abc.stager import MakeStager, Stager
from kvlayer.api.assembly import make_stager
from kvlayer.errors import LayoutError, MessageError
from kvlayer.identity.keys import Part
from kvlayer.layout import KVLayout, KVView
from kvlayer.memory.slab import Slab
from kvlayer.payload import ALIGNMENT, Payload
from kvlayer.runtime.loop_thread import LoopThread
from kvlayer.tier.messages import Completion, Greeting, Slot, Task, Verb
from kvlayer.tier.planner import plan
from kvlayer.tier.transfer.device import LocalDevice

__all__ = ["RankWorker"]


class RankWorker:
    """Carries out what the planner orders. Made by :meth:`open`; belongs to one event loop.

    A worker without a loop calls :meth:`start` and then
    ``rank.call(RankWorker.carry_out, order, view)``, or ``submit`` for a job to poll.
    """

    def __init__(self, slab: Slab, layout: KVLayout, stager: Stager, number: int) -> None:
        self.number = number
        self._slab = slab
        self._groups = [held.group for held in layout.groups]
        self._parts = [plan.rank_part(i, held) for i, held in enumerate(layout.groups)]
        self._payloads: dict[tuple[Part, int], Payload] = {}
        self._device = LocalDevice(slab, stager, self._payload)

    @classmethod
    @asynccontextmanager
    async def open(
        cls,
        greeting: bytes,
        layout: KVLayout,
        number: int = 0,
        *,
        slab_fd: int | None = None,
        make_stager: MakeStager = make_stager,
    ) -> AsyncGenerator[Self]:
        """Join the planner that sent ``greeting`` (``RankTeam.greeting``) as rank ``number``.

        ``layout`` is how this rank's own tensors lie. The slab is found through the planner's
        process id; ``slab_fd`` is a descriptor of it where that cannot be (other containers), and
        stays the caller's. ``make_stager`` as in ``Cache.open``. Raises ``MessageError`` for a
        greeting that is none, or of a planner that takes this rank for another;
        ``UnsupportedError`` when the slab cannot be mapped.
        """
        handle = _greeted(greeting, layout, number).slab
        async with AsyncExitStack() as resources:
            slab = Slab.attach_to(handle) if slab_fd is None else Slab.attach(slab_fd)
            resources.callback(slab.close)
            stager = make_stager(layout, slab, 2)
            resources.push_async_callback(stager.aclose)
            yield cls(slab, layout, stager, number)

    @classmethod
    def start(
        cls,
        greeting: bytes,
        layout: KVLayout,
        number: int = 0,
        *,
        slab_fd: int | None = None,
        make_stager: MakeStager = make_stager,
    ) -> LoopThread[RankWorker]:
        """:meth:`open` on a loop of its own, for a worker that has none. Close what it returns."""
        opener = partial(
            cls.open, greeting, layout, number, slab_fd=slab_fd, make_stager=make_stager
        )
        return LoopThread[RankWorker].start(opener, name=f"kvlayer-rank-{number}")

    async def carry_out(self, order: bytes | Task, view: KVView) -> bytes:
        """Move what ``order`` says between ``view`` and the slab; the completion to send back.

        ``order`` is the message, or what :meth:`order` has read of it. ``view`` is what the order's
        ``view`` names, lent until this returns. Whatever goes wrong with the move (a view that does
        not match, a device that fails) is in the completion. Raises ``MessageError``, and moves
        nothing, for bytes that are no order for this rank: such a message has no answer.
        Cancelled, it returns once view and slab are untouched.
        """
        asked = self._checked(order) if isinstance(order, Task) else self.order(order)
        try:
            if asked.verb is Verb.GATHER:
                await self._device.gather(view, asked.slots, asked.start)
            else:
                await self._device.scatter(view, asked.slots, asked.start, asked.stop)
        except Exception as exc:  # noqa: BLE001  # whatever the device says is the planner's to hear
            detail = f"rank {self.number}: {type(exc).__name__}: {exc}"
            return Completion.failed(asked, detail).to_bytes()
        return Completion(asked.number, self.number, len(asked.slots)).to_bytes()

    def order(self, packed: bytes) -> Task:
        """Read an order, to find the view it is for. Raises ``MessageError`` as ``carry_out``."""
        return self._checked(Task.from_bytes(packed))

    def _checked(self, asked: Task) -> Task:
        if asked.rank != self.number:
            raise MessageError(
                f"this is rank {self.number}, the order is for rank {asked.rank}",
                hint="send each rank its own orders",
            )
        if asked.stop < asked.start:
            raise MessageError(f"an order for tokens {asked.start}..{asked.stop}")
        for slot in asked.slots:
            self._check(slot)
        return asked

    def _check(self, slot: Slot) -> None:
        """Raise ``MessageError`` unless the slot is for this rank and lies within the slab."""
        part = slot.part
        if part.group >= len(self._parts) or not plan.accepts(self._parts[part.group], part):
            raise MessageError(
                f"{part} is no part of what rank {self.number} holds",
                hint="the planner and the rank must be built from the same layouts",
            )
        try:
            nbytes = self._payload(part, slot.num_tokens).nbytes
        except LayoutError as exc:
            raise MessageError(f"not an object of this model: {exc}") from exc
        if nbytes != slot.nbytes:
            raise MessageError(f"{part}: expected {nbytes} bytes, found {slot.nbytes}")
        if slot.offset % ALIGNMENT or slot.offset + nbytes > self._slab.nbytes:
            raise MessageError(
                f"{slot.offset}+{nbytes} is no slot of a slab of {self._slab.nbytes} bytes"
            )

    def _payload(self, part: Part, tokens: int) -> Payload:
        shape = self._payloads.get((part, tokens))
        if shape is None:
            shape = Payload.of(self._groups[part.group], part, tokens)
            self._payloads[part, tokens] = shape
        return shape


def _greeted(packed: bytes, layout: KVLayout, number: int) -> Greeting:
    """Read a greeting. Raises ``MessageError`` unless the planner plans for this very rank."""
    greeting = Greeting.from_bytes(packed)
    held = plan.described(layout)
    if number >= len(greeting.held):
        raise MessageError(
            f"the planner plans for {len(greeting.held)} rank(s), this is rank {number}",
            hint="ranks are numbered from 0",
        )
    for here, there in zip_longest(held, greeting.held[number], fillvalue="nothing"):
        if here != there:
            raise MessageError(
                f"rank {number} holds {here}, the planner expects {there}",
                hint="build the planner's RankTeam from the ranks' own layouts, in their order",
            )
    return greeting
