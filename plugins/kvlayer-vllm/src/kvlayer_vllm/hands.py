"""Who copies: this process's own tensors, or the ranks of workers elsewhere, by orders."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Protocol

from kvlayer import KVView, Portal
from kvlayer.errors import ClosedError, ForkedError, MessageError
from kvlayer.tier.messages import Completion, Order, Task
from kvlayer.tier.ranks.rank_team import RankTeam, RemoteView
from kvlayer_vllm.device_order import NOTHING, Queued
from kvlayer_vllm.layouts import RankLayout
from kvlayer_vllm.lent_tensors import LentTensors
from kvlayer_vllm.messages import Answers, RankOrder, Step
from kvlayer_vllm.moves import Load, Save, Slots

__all__ = ["WorkerLink", "LocalHands", "RemoteHands", "given_up"]

_log = logging.getLogger("vllm.kvlayer")  # below vLLM's, so that its users see it


class WorkerLink(Protocol):
    """How views are lent, and what goes to the workers with each step."""

    is_local: bool
    """Whether a worker of this process can wait for a copy."""

    @property
    def may_copy(self) -> bool:
        """Whether the engine has its tensors, as far as this process knows."""
        ...

    def view(self, slots: Sequence[Slots], owner: Save | Load) -> KVView:
        """Lend these slots, one array for each group of vLLM's, until ``owner`` is over."""
        ...

    def queued(self) -> Queued:
        """What a copy of this process must follow that reads what steps have computed by now."""
        ...

    def fill(self, step: Step) -> None:
        """Put into a step what the workers are to do."""
        ...

    def hear(self, answers: Answers) -> None:
        """Take what workers have answered."""
        ...


@dataclass(slots=True)
class LocalHands:
    """Engine and cache are one process: its tensors are lent as they are.

    ``tables`` says for each KV group whose block table it has, of vLLM's groups.
    """

    tensors: LentTensors
    tables: Sequence[int]
    is_local: bool = True

    @property
    def may_copy(self) -> bool:
        return self.tensors.are_there

    def view(self, slots: Sequence[Slots], owner: Save | Load) -> KVView:
        return KVView(self.tensors.lend(owner), [slots[table] for table in self.tables])

    def queued(self) -> Queued:
        return self.tensors.stream.queued()

    def fill(self, step: Step) -> None:
        """Nothing."""

    def hear(self, answers: Answers) -> None:
        """Nothing."""


class RemoteHands:
    """Workers have the tensors: orders go out with a step, and completions come back with it.

    Every rank picks its own orders, begins them with the step they come with, and answers them with
    this step or a later one. The step may be any: what an order reads is held until its completion
    has come back. ``shares[r]`` is what rank r holds; ``tables`` as in :class:`LocalHands`. Answers
    are read on the loop of ``portal``, which is the cache's.
    """

    is_local = False
    may_copy = True  # workers give up what they may not do

    def __init__(
        self,
        ranks: RankTeam,
        shares: Sequence[RankLayout],
        tables: Sequence[int],
        portal: Portal,
    ) -> None:
        self._ranks = ranks
        self._shares = tuple(shares)
        self._tables = tuple(tables)
        self._portal = portal
        self._numbers = count(1)
        self._slots: dict[str, tuple[tuple[bytes, ...], Save | Load]] = {}
        """By the name of a view: its slots, and whose they are."""
        self._absent = set(range(len(ranks)))
        """Those that have not said that they were greeted."""

    def view(self, slots: Sequence[Slots], owner: Save | Load) -> KVView:
        self._forget()
        name = f"view-{next(self._numbers)}"
        by_group = [slots[table] for table in self._tables]
        self._slots[name] = tuple(each.tobytes() for each in by_group), owner
        return RemoteView.of(name, *by_group)

    def queued(self) -> Queued:
        """Nothing: each rank orders its copies itself."""
        return NOTHING

    def fill(self, step: Step) -> None:
        if self._absent:
            step.greeting, step.shares = self._ranks.greeting(), self._shares
        for order in self._ranks.take():
            known = self._slots.get(order.view)
            if known is None:
                self._ranks.complete(given_up(order, "whatever it was for is over"))
                continue
            step.views[order.view] = known[0]
            message = self._ranks.message(order)
            step.errands.append(RankOrder(order.rank, order.verb, order.view, message))

    def hear(self, answers: Answers) -> None:
        self._absent -= answers.greeted
        if answers.completions:
            with suppress(ClosedError, ForkedError):  # nobody waits for them any more
                self._portal.post([partial(self._complete, each) for each in answers.completions])

    def _complete(self, completion: bytes) -> None:
        """On the cache's loop."""
        try:
            self._ranks.complete(completion)
        except MessageError:
            _log.exception("a rank's answer was not understood")

    def _forget(self) -> None:
        """Views of what is over have no more orders."""
        for name, (_, owner) in list(self._slots.items()):
            if owner.is_over:
                del self._slots[name]


def given_up(order: Order | Task, detail: str) -> bytes:
    """The answer to an order that is not carried out."""
    return Completion.failed(order, detail).to_bytes()
