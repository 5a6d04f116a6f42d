"""All that one planner knows, under one lock, and the clocks it is told the time by. No I/O."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from sys import intern
from threading import RLock
from typing import TypeVar, cast

from kvlayer._steps import Steps
from kvlayer.abc.policy import PolicyMaker
from kvlayer.errors import CapacityError
from kvlayer.identity.keys import Part
from kvlayer.layout import KVLayout
from kvlayer.payload import Payload
from kvlayer.tier.planner import plan
from kvlayer.tier.planner.directory import Directory
from kvlayer.tier.planner.holdings import Holdings
from kvlayer.tier.planner.host import HostTier
from kvlayer.tier.planner.journal import Journal
from kvlayer.tier.planner.lease import LeaseTable
from kvlayer.tier.planner.matcher import Matcher
from kvlayer.tier.planner.moment import Moment
from kvlayer.tier.planner.promises import Promises
from kvlayer.tier.planner.store_planner import StorePlanner

__all__ = ["Tables"]

T = TypeVar("T")

_MAX_SHAPES = 4096


class Tables:
    """One rank, or several ``ranks`` that ``layout`` unites, and KV of any number of namespaces.

    Host memory, its order of eviction and leases are common to all of them; a prompt's chain says
    in which it is looked up and stored. ``namespace`` (a digest) is served from the start.

    ``tiers`` are names, that of the host first; ``generations`` are the slab's. What is decided is
    decided by the pure files that are put together here; they are given the moment.
    """

    def __init__(
        self,
        namespace: str,
        layout: KVLayout,
        *,
        tiers: Sequence[str],
        capacity: int,
        policy: PolicyMaker,
        tokens_per_chunk: int,
        tokens_per_tail: int,
        head_shards: int = 0,
        ranks: Sequence[KVLayout] = (),
        generations: memoryview | None = None,
        clock: Callable[[], float],
        wall_clock: Callable[[], float],
    ) -> None:
        self.lock = RLock()
        self.layout = layout
        self.tiers = tuple(tiers)
        self.tokens_per_chunk = tokens_per_chunk
        self.tokens_per_tail = tokens_per_tail
        self._clock = clock
        self._wall_clock = wall_clock
        self._groups = [g.group for g in layout.groups]
        needs = [plan.rank_part(i, g) for i, g in enumerate(layout.groups)]
        self._cuts = plan.cuts(layout, ranks or (layout,), head_shards)
        self._payloads: dict[tuple[Part, int], Payload] = {}
        self.directory = Directory(needs)
        lengths = range(tokens_per_tail, tokens_per_chunk + 1, tokens_per_tail)
        self._matcher = Matcher(self.directory, self._groups, self._cuts, lengths)
        self.host = HostTier(capacity, policy, self.directory, generations, self._groups)
        self.leases = LeaseTable(self.host)
        self.journal = Journal()
        self.promises = Promises()
        self._holdings = Holdings(self.directory, self._matcher, self.journal, self.tiers)
        self._holdings.served[intern(namespace)] = None
        self._stores = StorePlanner(
            self.host,
            self._matcher,
            self.promises,
            self._holdings,
            groups=self._groups,
            cuts=self._cuts,
            payload=self.payload,
            tier=self.tiers[0],
        )
        chunk = sum(
            self.payload(part, tokens_per_chunk).nbytes for cut in self._cuts for part in cut
        )
        if self.host.extents.capacity < chunk:
            raise CapacityError(
                f"host memory of {capacity} bytes is smaller than one chunk of {chunk} bytes",
                hint="raise the capacity of the cpu:// tier or lower tokens_per_chunk",
            )

    def payload(self, part: Part, tokens: int) -> Payload:
        """The shape of an object."""
        shape = self._payloads.get((part, tokens))
        if shape is None:
            shape = Payload.of(self._groups[part.group], part, tokens)
            if len(self._payloads) >= _MAX_SHAPES:  # others name any number of parts
                self._payloads.clear()
            self._payloads[part, tokens] = shape
        return shape

    def _locked(self, steps: Steps[T]) -> Steps[T]:
        """Each of ``steps`` under one hold of the lock."""
        is_over = False
        try:
            while True:
                with self.lock:
                    try:
                        next(steps)
                    except StopIteration as end:
                        is_over = True
                        return cast("T", end.value)
                yield
        finally:
            if not is_over:
                with self.lock:
                    steps.close()

    def _now(self) -> Moment:
        return Moment(self._clock(), self._wall_clock())

    @property
    def has_forgotten(self) -> bool:
        """Whether tiers may hold more than the directory could remember of them."""
        return self.directory.forgotten > 0
