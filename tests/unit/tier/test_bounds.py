"""Every table of the planner has a bound, whatever is stored, listed, lost or never given back.

No table is named here: all that a planner leads to is walked, so a table that is added is held to
the same. What the bounds are is in docs/architecture.md.
"""

from __future__ import annotations

import random
from array import array
from collections import deque
from collections.abc import Iterator
from typing import Any
from weakref import WeakValueDictionary

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stacks import CHUNK, NAMESPACE, Clock, chain_of, holds_all, make_planner

from kvlayer.eviction.arc import ARC
from kvlayer.eviction.lfu import LFU
from kvlayer.eviction.lru import PrefixLRU
from kvlayer.identity.keys import ObjectKey, Part, Scope
from kvlayer.results import Cause
from kvlayer.tier.messages import Outcome
from kvlayer.tier.planner.absences import Absences
from kvlayer.tier.planner.journal import Journal
from kvlayer.tier.planner.lease import Lease
from kvlayer.tier.planner.planner import Planner
from kvlayer.tier.planner.promises import Promise
from kvlayer.tier.planner.records import HostState, ObjectRecord

PAGES = 16
MOST = 16
"""Entries that each bounded table may hold here."""
LEASED_AT_ONCE = 8
ROOM = 8
"""What a table may take for free places, growth by half and deadlines not cleared up yet."""

_TABLES = (dict, list, set, deque, array, bytearray, WeakValueDictionary)
_ENTRIES = (ObjectRecord, Lease, Promise)


def tables(root: object) -> Iterator[tuple[str, int]]:
    """Every container that ``root`` leads to through kvlayer's own objects, and its length."""
    seen: set[int] = set()
    todo: list[tuple[str, object]] = [("planner", root)]
    while todo:
        path, value = todo.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, _TABLES):
            # A digest is 32 bytes of a bytearray.
            yield path, len(value) // 32 if isinstance(value, bytearray) else len(value)
            if isinstance(value, dict):
                todo += [(f"{path}[]", each) for each in value.values()]
            elif isinstance(value, list):
                todo += [(f"{path}[]", each) for each in value]
        elif type(value).__module__.startswith("kvlayer.") and not isinstance(value, _ENTRIES):
            names = [*getattr(value, "__dict__", ())]
            for kind in type(value).__mro__:
                slots = getattr(kind, "__slots__", ())
                names += [slots] if isinstance(slots, str) else slots
            todo += [(f"{path}.{name}", getattr(value, name, None)) for name in names]


class Life:
    """A planner to which everything happens, always with prompts that nobody has seen before."""

    def __init__(self, planner: Planner, clock: Clock, seed: int) -> None:
        self.planner = planner
        self.clock = clock
        self.rng = random.Random(seed)
        self.count = 0
        self.leased = 0
        self.happens = [
            self.store, self.note, self.note, self.lose, self.deny, self.evict, self.ask
        ]  # fmt: skip

    def chain(self) -> Any:
        self.count += 1
        scope = Scope.private(f"tenant {self.count}") if self.rng.random() < 0.3 else Scope()
        chain = chain_of(self.rng.randrange(4, 80), seed=self.count, scope=scope)
        if self.rng.random() < 0.3:  # any number of qualities and epochs
            chain = chain.named_in(f"{self.count:064x}")
            self.planner.serve(chain.namespace)
        return chain

    def key(self) -> ObjectKey:
        """Of an object that only a lower tier has, in parts and forms of somebody else's."""
        self.count += 1
        form = self.rng.choice(["canonical", f"native:f{self.count}"])
        part = Part(0, self.rng.choice([(0, 1), (0, 2)]), self.rng.choice([(0, 1), (0, 2)]), form)
        zone = self.rng.choice(["0", f"{self.count:032x}"])
        digest = self.count.to_bytes(32, "big")
        return ObjectKey.of(NAMESPACE, zone, digest, CHUNK, part)

    def store(self) -> None:
        chain = self.chain()
        todo = self.planner.plan_store(chain, 0, tail=True, holds=holds_all)
        missed: list[Outcome] | None = [] if self.rng.random() < 0.8 else None
        self.planner.gathered(todo, missed)
        self.planner.remember(chain, todo.spans)
        for slot in todo.gathers if missed is not None else ():
            if self.planner.plan_spill(slot.span, slot.record, 1) is not None:
                self.planner.spilled(slot.record, 1, ok=self.rng.random() < 0.7)
        self.planner.settle(chain, todo.gathers)
        match = self.planner.match(chain)
        lease = self.planner.lease(match, owner=f"owner {self.count}", seconds=10.0)
        self.leased += 1
        if self.rng.random() < 0.7:
            self.planner.release(lease.number)
        if self.leased % LEASED_AT_ONCE == 0:
            self.clock.now += 10.0  # what nobody gave back runs out

    def note(self) -> None:
        key = self.key()
        self.planner.note([key], 1)
        found = self.planner.directory.find(key)
        if found is not None:
            self.planner.payload(found.part, found.tokens)
            match self.rng.randrange(4):
                case 0:
                    self.planner.missing(found, 1, Cause.CORRUPT, "", aside=True)
                case 1:
                    self.planner.missing(found, 1, Cause.EVICTED, "")
                case 2:
                    self.planner.vanished([key], 1, "")
                case _:
                    pass

    def lose(self) -> None:
        self.planner.vanished([self.key() for _ in range(4)], 1, "")

    def deny(self) -> None:
        self.planner.absent([self.key() for _ in range(4)], 1, self.clock.now)

    def evict(self) -> None:
        active = [
            found for found in self.planner.directory.active() if found.host is HostState.READY
        ]
        self.planner.evict(active[: self.rng.randrange(4)], Cause.CLEARED, "")

    def ask(self) -> None:
        self.planner.match(self.chain())

    def live(self, steps: int) -> None:
        for _ in range(steps):
            self.rng.choice(self.happens)()


@pytest.mark.parametrize("policy", [PrefixLRU, ARC, LFU])
@settings(max_examples=3, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_no_table_grows_beyond_its_bound(policy: Any, seed: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        for name in (
            "holdings._MAX_ASIDE",
            "holdings._MAX_WITHDRAWN",
            "holdings._MAX_SERVED",
            "tables._MAX_SHAPES",
        ):
            patch.setattr(f"kvlayer.tier.planner.{name}", MOST)
        patch.setattr("kvlayer.tier.planner.matcher._MAX_PARTS", MOST)
        clock = Clock()
        planner = make_planner(pages=PAGES, clock=clock, policy=policy)
        planner.journal = planner._holdings._journal = Journal(MOST)
        planner._holdings._absences = Absences(most=MOST)
        planner.directory._most_below = MOST
        planner.listing(1, NAMESPACE, started=True)
        life = Life(planner, clock, seed)
        life.live(900)
        bound = PAGES + MOST + LEASED_AT_ONCE + ROOM
        found = {path: size for path, size in tables(planner) if size > bound}
        assert found == {}
        assert life.count > 5 * bound
        assert planner.directory.forgotten > 0


def test_the_walk_sees_a_table_that_grows() -> None:
    planner = make_planner(pages=PAGES)
    for n in range(500):
        promise = planner.promises.make("", holder="", until=0.0)
        planner.promises.add(promise, n.to_bytes(32, "big"), "")
    (path,) = {path for path, size in tables(planner) if size > 400}
    assert path.endswith("promises._by_chunk")
