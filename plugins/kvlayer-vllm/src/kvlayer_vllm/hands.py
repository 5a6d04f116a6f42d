"""Who copies: this process's own tensors, or the ranks of workers elsewhere, by orders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any, Protocol

from kvlayer import KVView
from kvlayer.tier.messages import Completion, Order, Task
from kvlayer.tier.ranks.rank_team import RankTeam, RemoteView
from kvlayer_vllm.messages import Answers, RankOrder, Step
from kvlayer_vllm.moves import Load, Save, Slots

__all__ = ["WorkerLink", "LocalHands", "RemoteHands", "given_up"]


class WorkerLink(Protocol):
    """How views are lent, and what goes to the workers with each step."""

    is_local: bool
    """Whether a worker of this process can wait for a copy."""

    def view(self, slots: Sequence[Slots], owner: Save | Load) -> KVView:
        """Lend these slots, one array for each group of vLLM's, until ``owner`` is over."""
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

    caches: list[list[Any]]
    tables: Sequence[int]
    is_local: bool = True

    def view(self, slots: Sequence[Slots], owner: Save | Load) -> KVView:
        return KVView(self.caches, [slots[table] for table in self.tables])

    def fill(self, step: Step) -> None:
        """Nothing."""

    def hear(self, answers: Answers) -> None:
        """Nothing."""


class RemoteHands:
    """Workers have the tensors: orders go out with a step, and completions come back with it.

    An order is carried out in the step it comes with, which may be any: what it reads is held until
    its completion has come back. ``tables`` as in :class:`LocalHands`.
    """

    is_local = False

    def __init__(self, ranks: RankTeam, tables: Sequence[int]) -> None:
        self._ranks = ranks
        self._tables = tuple(tables)
        self._numbers = count(1)
        self._slots: dict[str, tuple[tuple[bytes, ...], Save | Load]] = {}
        """By the name of a view: its slots, and whose they are."""
        self._absent = set(range(len(ranks)))

    def view(self, slots: Sequence[Slots], owner: Save | Load) -> KVView:
        self._forget()
        name = f"view-{next(self._numbers)}"
        by_group = [slots[table] for table in self._tables]
        self._slots[name] = tuple(each.tobytes() for each in by_group), owner
        return RemoteView.of(name, *by_group)

    def fill(self, step: Step) -> None:
        if self._absent:
            step.greeting = self._ranks.greeting()
        for order in self._ranks.take():
            known = self._slots.get(order.view)
            if known is None:
                self._ranks.complete(given_up(order, "whatever it was for is over"))
            else:
                step.errands.append(RankOrder(order.to_bytes(), order.verb, known[0]))

    def hear(self, answers: Answers) -> None:
        self._absent -= answers.joined
        for completion in answers.completions:
            self._ranks.complete(completion)

    def _forget(self) -> None:
        """Views of what is over have no more orders."""
        for name, (_, owner) in list(self._slots.items()):
            if owner.is_over:
                del self._slots[name]


def given_up(order: Order | Task, detail: str) -> bytes:
    """The answer to an order that is not carried out."""
    return Completion.failed(order, detail).to_bytes()
