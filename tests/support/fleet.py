"""A planner's portal and its ranks in one process, with the engine's transport between them."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from engine import Engine
from hang import HANG

from kvlayer import Cache, CacheConfig, KVLayout, Portal
from kvlayer.api.rank_worker import RankWorker
from kvlayer.runtime.job import Job
from kvlayer.runtime.loop_thread import LoopThread
from kvlayer.tier.messages import Completion, Order
from kvlayer.tier.ranks.rank_team import RankTeam, RemoteView

T = TypeVar("T")


@dataclass
class Fleet:
    """``engines[r]`` is what rank r's views show; ``slots`` where a view of any name lies."""

    portal: Portal
    ranks: RankTeam
    workers: list[LoopThread[RankWorker]]
    engines: list[Engine]
    slots: dict[str, Any] = field(default_factory=dict[str, Any])
    orders: list[Order] = field(default_factory=list[Order])
    """Everything that was carried out."""
    spoil: Callable[[Completion], Completion] = field(default=lambda completion: completion)

    def view(self, name: str, slots: Any) -> RemoteView:
        self.slots[name] = slots
        return RemoteView.of(name, *[slots] * len(self.engines[0].layout.groups))

    def answer(self, order: Order) -> bytes:
        """What the order's rank says when it has carried it out."""
        view = self.engines[order.rank].view(self.slots[order.view])
        packed = self.workers[order.rank].call(RankWorker.carry_out, order.to_bytes(), view)
        return self.spoil(Completion.from_bytes(packed)).to_bytes()

    def drive(self, job: Job[T]) -> T:
        """Carry orders out until ``job`` is done; its result."""
        while not job.done():
            for order in self.ranks.take(0.01):
                assert self.ranks.message(order) == order.to_bytes()
                self.orders.append(order)
                self.ranks.complete(self.answer(order))
        return job.wait(0)

    def store(self, tokens: Any, slots: Any, **more: Any) -> Any:
        return self.drive(
            self.portal.submit(Cache.store, tokens, self.view("store", slots), **more)
        )

    def load(self, tokens: Any, slots: Any) -> Any:
        """Look up and retrieve; the report."""
        with self.portal.lookup(tokens) as lookup:
            hit = lookup.wait(HANG)
            return self.drive(self.portal.submit(Cache.retrieve, hit, self.view("load", slots)))

    def fresh(self, seed: int) -> None:
        """Every rank's tensors hold something else now."""
        self.engines = [
            Engine(e.layout, e.num_blocks, seed + i) for i, e in enumerate(self.engines)
        ]


@contextmanager
def fleet(
    config: CacheConfig, layout: KVLayout, ranks: Sequence[KVLayout], *, blocks: int = 32
) -> Generator[Fleet]:
    with ExitStack() as stack:
        fleet = RankTeam(ranks)
        portal = stack.enter_context(Portal.open(config, layout, ranks=fleet))
        greeting = fleet.greeting()
        workers = [
            stack.enter_context(RankWorker.start(greeting, each, number))
            for number, each in enumerate(ranks)
        ]
        engines = [Engine(each, blocks, 1 + number) for number, each in enumerate(ranks)]
        yield Fleet(portal, fleet, workers, engines)
