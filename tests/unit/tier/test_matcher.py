"""The matcher over objects that chunks, tails and cuts have left: the farthest way through them."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from stacks import (
    CHUNK,
    NAMESPACE,
    TAIL,
    chain_of,
    check_accounts,
    hybrid_layout,
    make_planner,
    probes,
    store,
    tail_probes,
)

from kvlayer._steps import Steps, finish
from kvlayer.identity.keys import ChunkChain, ObjectKey, Part, Salt, Scope, Span
from kvlayer.tier.planner import lookup_planner, matcher, walk
from kvlayer.tier.planner.match import Match
from kvlayer.tier.planner.planner import Planner

FULL = Part(0, (0, 2), (0, 2))
WINDOW = Part(1, (0, 1), (0, 2))
STATE = Part(2, (0, 1), None)


def key(chain: ChunkChain, start: int, stop: int, part: Part = FULL) -> ObjectKey:
    zone, link = chain.zone_before(stop), chain.links[stop // TAIL - 1]
    return ObjectKey.of(NAMESPACE, zone, link, stop - start, part)


def lies(planner: Planner, chain: ChunkChain, *spans: tuple[int, int], part: Part = FULL) -> None:
    planner.note([key(chain, start, stop, part) for start, stop in spans], 1)


def found(planner: Planner, chain: ChunkChain) -> list[tuple[int, int]]:
    return [(span.start, span.stop) for span in planner.match(chain).spans]


SPANS = [
    (start, stop)
    for start in range(0, 4 * CHUNK, TAIL)
    for stop in range(start + TAIL, start - start % CHUNK + CHUNK + 1, TAIL)
]


@settings(deadline=None)  # a busy machine is no failure
@given(
    st.sets(st.sampled_from(SPANS)),
    st.sets(st.integers(0, 3)),
    st.integers(0, 4 * CHUNK),
    st.sampled_from([Scope(), Scope.private("s", first_token=20)]),
)
def test_a_match_is_the_farthest_way_from_span_to_span(
    there: set[tuple[int, int]], whole: set[int], count: int, scope: Scope
) -> None:
    planner, chain = make_planner(), chain_of(count, scope=scope)
    there |= {(index * CHUNK, (index + 1) * CHUNK) for index in whole}
    lies(planner, chain_of(4 * CHUNK, scope=scope), *there)
    reached = {0}
    for start, stop in sorted(there):
        if start in reached and stop <= count:
            reached.add(stop)
    match = planner.match(chain)
    spans = found(planner, chain)
    assert match.tokens == max(reached)
    assert set(spans) <= there
    assert all(one[1] == other[0] for one, other in pairwise([(0, 0), *spans]))
    assert [r.key for r in match.path()] == [key(chain, *span) for span in spans]
    assert all(
        span in spans for span in there if span[1] - span[0] == CHUNK and span[1] <= match.tokens
    )


@settings(deadline=None)
@example(hybrid=False, resident=[7], missing=set(), step=2, few=9)
@given(
    hybrid=st.booleans(),
    resident=st.lists(st.integers(0, 24), max_size=3),
    missing=st.sets(st.integers(0, 23), max_size=3),
    step=st.integers(1, 5),
    few=st.integers(1, 9),
)
def test_a_prompt_found_slice_by_slice_is_found_as_far_as_at_once(
    hybrid: bool, resident: list[int], missing: set[int], step: int, few: int
) -> None:
    planner = make_planner(layout=hybrid_layout() if hybrid else None, pages=256)
    chain = chain_of(24 * CHUNK)
    for chunks in resident:  # what a shorter prompt leaves is a strand of its own
        store(planner, chain.until(chunks * CHUNK))
        planner.release(planner.lease(planner.match(chain), owner="", seconds=1.0).number)
    for part in (FULL, WINDOW, STATE) if hybrid else (FULL,):
        below = (at for at in range(24) if at not in missing)
        lies(planner, chain, *((at * CHUNK, (at + 1) * CHUNK) for at in below), part=part)
    at_once = planner.match(chain)
    with pytest.MonkeyPatch.context() as patch:
        for module in (walk, matcher, lookup_planner):
            patch.setattr(module, "SLICE", step)
        patch.setattr(lookup_planner, "FEW", few)
        in_slices = planner.match(chain)
        assert in_slices.spans == at_once.spans
        assert in_slices.path() == at_once.path()
        leased = finish(planner.leasing(chain, (), _all_of_it, owner="", seconds=1.0))
        assert leased is not None and leased[0].spans == at_once.spans
        planner.release(leased[1].number)
    check_accounts(planner, idle=True)


def _all_of_it(match: Match) -> Steps[Match]:
    yield from ()
    return match


def test_of_two_ways_to_one_end_that_with_fewer_objects_is_taken() -> None:
    planner, chain = make_planner(), chain_of(16)
    lies(planner, chain, (0, 4), (4, 8), (8, 12), (0, 8), (12, 16))
    assert found(planner, chain) == [(0, 8), (8, 12), (12, 16)]


def test_a_short_way_that_leads_on_beats_a_longer_one_that_does_not() -> None:
    planner, chain = make_planner(), chain_of(40)
    lies(planner, chain, (0, 12), (0, 4), (4, 16), (16, 32))
    assert found(planner, chain) == [(0, 4), (4, 16), (16, 32)]


def test_the_same_end_with_other_tokens_is_another_object() -> None:
    planner, chain = make_planner(), chain_of(16)
    lies(planner, chain, (12, 16))
    assert planner.match(chain).tokens == 0
    assert key(chain, 0, 16) in probes(planner, chain)
    lies(planner, chain, (0, 16))
    assert len(planner.directory) == 2
    assert found(planner, chain) == [(0, 16)]
    planner.vanished([key(chain, 0, 16)], 1, "gone")
    assert [r.tokens for r in planner.directory.ending(NAMESPACE, chain.hashes[0])] == [4]
    assert planner.journal.loss(chain, chain.ends(12)[0]) is None
    assert planner.journal.loss(chain, chain.span(0)) is not None


def test_a_listing_that_makes_up_a_zone_is_not_believed() -> None:
    """A hash tells the zone. What lies under another one is somebody's invention."""
    planner, chain = make_planner(), chain_of(16)
    forged = ObjectKey.of(NAMESPACE, Salt("s").zone, chain.hashes[0], CHUNK, FULL)
    planner.note([forged], 1)
    assert planner.match(chain).tokens == 0
    lies(planner, chain, (0, 16))
    assert [r.key for r in planner.match(chain).path()] == [key(chain, 0, 16)]


def test_what_is_in_use_is_told_apart_by_tokens_and_by_zone() -> None:
    directory = make_planner().directory
    spans = [(Span(0, 16, b"h" * 32), "0"), (Span(12, 16, b"h" * 32), "0")]
    spans.append((Span(0, 16, b"h" * 32), Salt("s").zone))
    records = [directory.ensure(NAMESPACE, span, zone, FULL) for span, zone in spans]
    assert len({record.key for record in records}) == 3
    for record, (span, zone) in zip(records, spans, strict=True):
        assert directory.chunk(NAMESPACE, span.hash, span.tokens, zone) is record.chunk
        assert (record.key.tokens, record.key.zone) == (span.tokens, zone)


@pytest.mark.parametrize("tokens", [1, TAIL - 1, TAIL + 1, CHUNK + TAIL, 10**8])
def test_a_length_that_no_object_has_is_not_believed(tokens: int) -> None:
    planner, chain = make_planner(), chain_of(16)
    planner.note([ObjectKey.of(NAMESPACE, "0", chain.hashes[0], tokens, FULL)], 1)
    assert len(planner.directory) == 0


def test_chunks_behind_short_spans_are_not_asked_for_again() -> None:
    planner, chain = make_planner(), chain_of(64)
    lies(planner, chain, (0, 16), (16, 24), (24, 32), (32, 48))
    assert probes(planner, chain) == [key(chain, 48, 64)]
    assert [k.tokens for k in tail_probes(planner, chain)] == [12, 8, 4]


def test_a_window_and_a_state_may_end_at_a_cut() -> None:
    planner, chain = make_planner(layout=hybrid_layout(4)), chain_of(28)
    for part in (FULL, WINDOW, STATE):
        lies(planner, chain, (0, 16), part=part)
    lies(planner, chain, (16, 20), (20, 24), (24, 28))
    for part in (WINDOW, STATE):
        lies(planner, chain, (16, 20), part=part)
        lies(planner, chain, (20, 24), part=part)
    assert found(planner, chain) == [(0, 16), (16, 20), (20, 24)]
    planner.vanished([key(chain, 20, 24, STATE)], 1, "gone")
    assert found(planner, chain) == [(0, 16), (16, 20)]


@settings(deadline=None, max_examples=50)  # a busy machine is no failure
@given(st.sets(st.sampled_from(SPANS[:10])), st.randoms(use_true_random=False))
def test_records_that_end_alike_come_and_go_one_by_one(
    there: set[tuple[int, int]], chance: Any
) -> None:
    planner, chain = make_planner(), chain_of(CHUNK)
    lies(planner, chain, *there)
    left = sorted(there)
    chance.shuffle(left)
    while True:
        assert len(planner.directory) == len(left)
        known = {(r.hash, r.tokens) for r in planner.directory.chunks()}
        assert known == {(chain.links[stop // TAIL - 1], stop - start) for start, stop in left}
        assert sorted(o.key for o in planner.directory.objects()) == sorted(
            key(chain, *span) for span in left
        )
        if not left:
            break
        planner.vanished([key(chain, *left.pop())], 1, "gone")
