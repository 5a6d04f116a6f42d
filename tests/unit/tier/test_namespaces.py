"""Several namespaces in one planner: one slab, one order; nothing is served as another's."""

from __future__ import annotations

import gc
import random
import tracemalloc
from collections import defaultdict

from hypothesis import given, settings
from hypothesis import strategies as st
from stacks import CHUNK, NAMESPACE, Clock, chain_of, check_accounts, make_planner, store

from kvlayer.identity.keys import ChunkChain, ObjectKey
from kvlayer.results import Cause
from kvlayer.tier.planner.match import Match
from kvlayer.tier.planner.planner import Planner
from kvlayer.tier.planner.records import HostState, ObjectRecord

OTHERS = ["cd" * 32, "ef" * 32]
ALL = [NAMESPACE, *OTHERS]


def own(match: Match, namespace: str) -> bool:
    return all(found.namespace == namespace for found in match.path())


def in_each(chain: ChunkChain) -> list[ChunkChain]:
    return [chain.named_in(namespace) for namespace in ALL]


def test_the_same_tokens_have_kv_in_each_namespace() -> None:
    planner = make_planner()
    one, two, three = in_each(chain_of(3 * CHUNK))
    store(planner, one)
    assert planner.match(one).tokens == 3 * CHUNK
    assert planner.match(two).tokens == 0
    todo = store(planner, two.until(2 * CHUNK))
    assert len(todo.spans) == 2  # another's is not "there already"
    found, other = planner.match(one), planner.match(two)
    assert (found.tokens, other.tokens, planner.match(three).tokens) == (3 * CHUNK, 2 * CHUNK, 0)
    assert own(found, NAMESPACE) and own(other, OTHERS[0])
    offsets = {record.offset for record in [*found.path(), *other.path()]}
    assert len(offsets) == 5
    check_accounts(planner)


def test_host_memory_its_order_and_leases_are_common() -> None:
    """The least recently used goes, whosever it is; what is leased stays, whosever it is."""
    planner = make_planner(pages=4)
    first, second, third = (
        chain.named_in(ns) for chain, ns in zip([chain_of(2 * CHUNK)] * 3, ALL, strict=True)
    )
    store(planner, first)
    lease = planner.lease(planner.match(first), owner="somebody", seconds=10.0)
    store(planner, second)
    todo = store(planner, third)
    assert {gone.namespace for gone in todo.evicted} == {OTHERS[0]}
    assert planner.counts([]).used_nbytes == 4 * 4096
    assert planner.counts([]).owners["somebody"].leases == 1
    assert planner.match(first).tokens == planner.match(third).tokens == 2 * CHUNK
    planner.release(lease.number)
    check_accounts(planner, idle=True)


def test_what_a_tier_says_is_noted_for_the_namespaces_that_are_asked_for() -> None:
    """A directory is shared with other models: their objects are none of this planner's."""
    planner = make_planner()
    mine, asked, strange = in_each(chain_of(CHUNK))
    store(planner, mine)
    part = planner.directory.needs[0]
    keys = [
        ObjectKey.of(chain.namespace, "0", chain.hashes[0], CHUNK, part)
        for chain in (mine, asked, strange)
    ]
    planner.search(planner.match(asked), every=True)
    planner.note(keys, 1)
    assert [planner.match(chain).tokens for chain in (mine, asked, strange)] == [16, 16, 0]
    planner.vanished(keys[2:], 1, "evicted by its own")
    assert planner.match(asked).path()[0].tiers == 1 << 1
    planner.vanished(keys[1:2], 1, "evicted")
    assert planner.match(asked).tokens == 0
    assert planner.match(mine).path()[0].tiers == 1 << 1  # of the same tokens, but not the same KV
    assert planner.served()[:1] == [NAMESPACE] and OTHERS[1] not in planner.served()


def test_promises_and_explanations_are_of_one_namespace() -> None:
    planner = make_planner()
    mine, other, _ = in_each(chain_of(CHUNK))
    todo = planner.plan_store(mine, 0, tail=False, holds=lambda _g, _s: True)
    assert todo.promise is not None and todo.promise.namespace == NAMESPACE
    assert planner.promised(planner.match(mine), 0.0) is not None
    assert planner.promised(planner.match(other), 0.0) is None
    planner.gathered(todo, ())
    planner.settle(mine, todo.gathers)
    planner.remember(mine, todo.spans)
    planner.evict([slot.record for slot in todo.gathers], Cause.CLEARED, "by request")
    span = mine.span(0)
    assert planner.account(mine, span).loss is not None
    assert planner.account(other, span).loss is None
    assert not planner.account(other, span).is_own or planner.account(other, span).loss is None


def test_a_namespace_that_has_nothing_any_more_leaves_nothing() -> None:
    planner = make_planner()
    chains = in_each(chain_of(4 * CHUNK))
    for chain in chains:
        store(planner, chain)
    planner.evict(list(planner.directory.objects()), Cause.CLEARED, "")
    assert len(planner.directory) == 0 and not planner.directory._chunks
    assert not list(planner.directory.objects())


class Life:
    """What three namespaces hold, as a model knows it: by namespace and prompt, in chunks."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.clock = Clock()
        self.planner = make_planner(pages=self.rng.choice([6, 12, 64]), clock=self.clock)
        self.prompts = [chain_of(4 * CHUNK, seed=n) for n in range(2)]
        self.below: dict[str, set[bytes]] = defaultdict(set)

    def pick(self) -> ChunkChain:
        return self.rng.choice(self.prompts).named_in(self.rng.choice(ALL))

    def store(self) -> None:
        chain = self.pick()
        store(self.planner, chain.until(self.rng.randrange(1, 5) * CHUNK))

    def note(self) -> None:
        chain = self.pick()
        self.planner.serve(chain.namespace)
        end = self.rng.choice(chain.hashes)
        part = self.planner.directory.needs[0]
        self.planner.note([ObjectKey.of(chain.namespace, "0", end, CHUNK, part)], 1)
        self.below[chain.namespace].add(end)

    def vanish(self) -> None:
        chain = self.pick()
        part = self.planner.directory.needs[0]
        keys = [ObjectKey.of(chain.namespace, "0", h, CHUNK, part) for h in chain.hashes]
        self.planner.vanished(keys, 1, "")
        self.below[chain.namespace] -= set(chain.hashes)

    def evict(self) -> None:
        records = [r for r in self.planner.directory.active() if r.host is HostState.READY]
        some = self.rng.sample(records, min(len(records), 3))
        self.planner.evict(some, Cause.CLEARED, "")

    def lease(self) -> None:
        match = self.planner.match(self.pick())
        self.planner.lease(match, owner="", seconds=self.rng.choice([1.0, 5.0]))
        self.clock.now += 1.0

    def check(self) -> None:
        resident: dict[tuple[str, bytes], ObjectRecord] = {
            (found.namespace, found.hash): found for found in self.planner.directory.objects()
        }
        for prompt in self.prompts:
            for chain in in_each(prompt):
                match = self.planner.match(chain)
                assert own(match, chain.namespace)
                known = 0
                for end in chain.hashes:
                    found = resident.get((chain.namespace, end))
                    is_below = end in self.below[chain.namespace]
                    if found is None or not (found.host is HostState.READY or is_below):
                        break
                    known += CHUNK
                assert match.tokens == known
        check_accounts(self.planner)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_nothing_of_one_namespace_is_ever_found_in_another(seed: int) -> None:
    life = Life(seed)
    for _ in range(40):
        life.rng.choice([life.store, life.store, life.note, life.vanish, life.evict, life.lease])()
        life.check()
    assert life.planner.directory.held(1) == sum(map(len, life.below.values()))


def _traced(namespaces: list[str], prompts: int) -> float:
    """Bytes an object that is resident costs."""
    planner: Planner = make_planner(pages=prompts * 64 * len(namespaces))
    chains = [chain_of(64 * CHUNK, seed=n) for n in range(prompts)]
    gc.collect()
    tracemalloc.start()
    for chain in chains:
        for namespace in namespaces:
            store(planner, chain.named_in(namespace))
    gc.collect()
    nbytes, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return nbytes / (prompts * 64 * len(namespaces))


def test_an_object_costs_no_more_memory_among_several_namespaces() -> None:
    alone, among = _traced([NAMESPACE], 12), _traced(ALL, 4)
    assert among < 1.02 * alone + 8
