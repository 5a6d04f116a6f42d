"""The law of quality, decided: a hit is exact, or exact and then of one quality, and says so."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stacks import (
    CHUNK,
    NAMESPACE,
    TAIL,
    chain_of,
    check_accounts,
    holds_all,
    hybrid_layout,
    make_planner,
    make_rig,
    store,
    whole,
)

from kvlayer._steps import finish
from kvlayer.identity.chain import ChunkChain
from kvlayer.identity.epoch import Epoch
from kvlayer.identity.quality import EXACT, Accepted
from kvlayer.results import Cause
from kvlayer.testing.sim import in_virtual_time
from kvlayer.tier.planner.match import Match
from kvlayer.tier.planner.planner import Planner
from kvlayer.tier.planner.records import HostState

COARSE, FINE = "cd" * 32, "ef" * 32
SPACES = {EXACT: NAMESPACE, "coarse": COARSE, "fine": FINE}
EPOCH = Epoch(NAMESPACE)


def asked(chain: ChunkChain, *names: str) -> ChunkChain:
    """The chain of a request that accepts these qualities."""
    return chain.bound(EPOCH, accepts=tuple(Accepted(name, SPACES[name]) for name in names))


def put(planner: Planner, chain: ChunkChain, quality: str, *, first: int = 0) -> None:
    """Store as a cache does: what is exact already is skipped. ``first``: the first chunk."""
    named = chain.bound(EPOCH, SPACES[quality])
    store(planner, named, first_token=first * CHUNK, tail=True)


def qualities(match: Match) -> list[str]:
    """The quality of each span, by what serves it; all groups of a span are of one."""
    names = {digest: name for name, digest in SPACES.items()}
    found: list[str] = []
    for covers in match.covers:
        own = {names[record.namespace] for cover in covers for record in cover}
        assert len(own) <= 1
        found += own
    return found


def lawful(match: Match) -> None:
    """Exact, or exact followed by one quality, and it says which and from where on."""
    order = qualities(match)
    exact = order.count(EXACT)
    rest = order[exact:]
    assert order[:exact] == [EXACT] * exact
    assert len(set(rest)) <= 1
    assert match.quality == (rest[0] if rest else EXACT)
    if rest:
        assert match.exact_tokens == match.spans[len(match.spans) - len(rest)].start
        assert match.exact_tokens < match.tokens
    else:
        assert match.exact_tokens == match.tokens


def test_exact_comes_first_and_what_follows_is_of_one_quality() -> None:
    planner, chain = make_planner(), chain_of(6 * CHUNK)
    put(planner, chain.until(2 * CHUNK), EXACT)
    put(planner, chain.until(5 * CHUNK), "coarse")
    put(planner, chain, "fine", first=2)
    found = planner.match(asked(chain, "coarse", "fine"))
    assert qualities(found) == [EXACT] * 2 + ["fine"] * 4  # the longest
    assert (found.quality, found.exact_tokens, found.tokens) == ("fine", 2 * CHUNK, 6 * CHUNK)
    assert qualities(planner.match(asked(chain, "coarse"))) == [EXACT] * 2 + ["coarse"] * 3
    assert planner.match(asked(chain)).quality == EXACT
    assert planner.match(chain).tokens == 2 * CHUNK
    five = chain.until(5 * CHUNK)
    for order in (("coarse", "fine"), ("fine", "coarse")):  # of equally long ones
        assert planner.match(asked(five, *order)).quality == order[0]
    put(planner, chain, EXACT)
    assert planner.match(asked(chain, "coarse", "fine")).quality == EXACT


def test_an_exact_tail_gives_way_only_to_what_is_longer() -> None:
    planner, chain = make_planner(), chain_of(2 * CHUNK + 2 * TAIL)
    put(planner, chain, EXACT)
    longer = chain_of(4 * CHUNK)
    put(planner, longer, "coarse", first=2)
    found = planner.match(asked(chain, "coarse"))
    assert (found.quality, found.tokens) == (EXACT, 2 * CHUNK + 2 * TAIL)
    found = planner.match(asked(longer, "coarse"))
    assert (found.quality, found.tokens, found.exact_tokens) == ("coarse", 64, 2 * CHUNK)


def test_a_store_of_a_quality_skips_what_is_exact_and_never_counts_as_exact() -> None:
    planner, chain = make_planner(), chain_of(4 * CHUNK)
    put(planner, chain.until(2 * CHUNK), EXACT)
    coarse = chain.bound(EPOCH, COARSE)
    todo = planner.plan_store(coarse, 0, tail=True, holds=holds_all, at_once=1)
    held = {found.namespace for found in todo.held}
    planner.plan_more(todo, 16)
    assert [slot.record.namespace for slot in todo.gathers] == [COARSE] * 2
    assert [span.start for span, _ in todo.skipped] == [0, CHUNK]
    planner.gathered(todo, ())
    planner.settle(coarse, todo.gathers)
    assert held == {NAMESPACE}  # room does not come from what leads there
    assert planner.match(asked(chain)).tokens == 2 * CHUNK
    todo = store(planner, chain.bound(EPOCH))
    assert [slot.record.namespace for slot in todo.gathers] == [NAMESPACE] * 2
    check_accounts(planner, idle=True)


def test_who_matches_a_hit_again_is_served_no_other_quality_and_none_earlier() -> None:
    planner, chain = make_planner(), chain_of(6 * CHUNK)
    put(planner, chain.until(3 * CHUNK), EXACT)
    put(planner, chain.until(5 * CHUNK), "coarse")
    put(planner, chain, "coarse", first=3)
    match, lease = _leased(planner, asked(chain, "fine", "coarse"))
    assert (match.quality, match.exact_tokens) == ("coarse", 3 * CHUNK)
    planner.release(lease)
    put(planner, chain, "fine", first=3)
    exact = [r for r in match.path() if r.namespace == NAMESPACE]
    coarse = [r for r in match.path() if r.namespace == COARSE]
    planner.evict(coarse[1:], Cause.CLEARED, "")
    again = planner.match(match.chain)
    assert qualities(again) == [EXACT] * 3 + ["coarse"]
    # Whoever took the first three chunks as exact must not be given others in their place.
    chain_ = chain.bound(EPOCH, COARSE)
    planner.evict(exact[1:], Cause.CLEARED, "")
    store(planner, chain_)
    again = planner.match(match.chain)
    assert (qualities(again), again.quality) == ([EXACT], EXACT)


def _leased(planner: Planner, chain: ChunkChain) -> tuple[Match, int]:
    leased = planner.lease_match(chain, (), whole, owner="", seconds=10.0)
    assert leased is not None
    return leased[0], leased[1].number


@pytest.mark.parametrize("hybrid", [False, True])
@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_every_hit_keeps_the_law_whatever_is_stored_and_goes(hybrid: bool, seed: int) -> None:
    rng = random.Random(seed)
    planner = make_planner(layout=hybrid_layout() if hybrid else None, pages=400)
    whole = chain_of(6 * CHUNK + TAIL)
    for _ in range(25):
        if rng.random() < 0.6:
            stop = rng.choice([rng.randrange(1, 7) * CHUNK, whole.num_tokens])
            put(planner, whole.until(stop), rng.choice([*SPACES]), first=rng.randrange(5))
        else:
            ready = [r for r in planner.directory.active() if r.host is HostState.READY]
            planner.evict(rng.sample(ready, min(len(ready), 4)), Cause.CLEARED, "")
        names = rng.sample(["coarse", "fine"], rng.randrange(3))
        match = planner.match(asked(whole, *names))
        lawful(match)
        assert match.quality in (EXACT, *names)
        exact = planner.match(asked(whole))
        assert exact.quality == EXACT and match.tokens >= exact.tokens
        assert match.tokens > exact.tokens or match.quality == EXACT
        for name in names:
            assert match.tokens >= planner.match(asked(whole, name)).tokens
        if match.tokens:
            shorter = finish(planner.shortened(match, rng.randrange(len(match.spans) + 1)))
            lawful(shorter)
    check_accounts(planner)


@in_virtual_time
async def test_tiers_are_asked_about_what_follows_exact_kv_and_about_nothing_before() -> None:
    rig, chain = make_rig(shared=True), chain_of(6 * CHUNK)
    await rig.send_down(chain.until(3 * CHUNK).bound(EPOCH))
    await rig.send_down(chain.bound(EPOCH, FINE))
    rig.planner.vanished([*rig.backend.objects], 1, "")  # this process does not know
    keys = [k for k in rig.backend.objects if k.namespace == FINE]
    for key in keys:
        if key.end_hash in chain.hashes[:3]:
            del rig.backend.objects[key]
    rig.clock.now += 10.0
    rig.backend.calls.clear()
    seen = [(await rig.stack.finder.find(asked(chain, *names))) for names in [(), ("fine",)]]
    assert [(m.tokens, m.quality) for m in seen] == [(3 * CHUNK, EXACT), (6 * CHUNK, "fine")]
    asked_about = [key for what, key in rig.backend.calls if what == "contains"]
    fine = {key.end_hash for key in asked_about if key.namespace == FINE}
    assert fine & {*chain.hashes} == {*chain.hashes[3:]}
    match, lease = await rig.stack.finder.lease(
        asked(chain, "coarse", "fine"), owner="", seconds=10.0
    )
    assert (match.quality, match.exact_tokens) == ("fine", 3 * CHUNK)
    rig.planner.release(lease.number)
    assert rig.stack.finder.lease_at_once(asked(chain, "fine"), owner="", seconds=1.0) is not None
    await rig.aclose()
