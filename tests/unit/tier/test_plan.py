"""Cutting, covering and counting a prefix, against brute force."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from kvlayer.errors import LayoutError
from kvlayer.identity.keys import Part
from kvlayer.layout import (
    MLA_BLOCKS,
    NHD,
    AttentionKind,
    GroupLayout,
    HitRule,
    KVGroup,
)
from kvlayer.tier.planner import plan

LAYERS, HEADS = 6, 8


def mha(heads: int = HEADS) -> KVGroup:
    return KVGroup(AttentionKind.MHA, tuple(range(LAYERS)), "float16", heads, 8)


@st.composite
def ranges(draw: st.DrawFn, limit: int) -> tuple[int, int]:
    lo = draw(st.integers(0, limit - 1))
    return lo, draw(st.integers(lo + 1, limit))


PARTS = st.builds(
    Part,
    st.just(0),
    ranges(LAYERS),
    ranges(HEADS),
    st.sampled_from(["canonical", "canonical", "canonical", "native:a", "native:b"]),
)


def cells(part: Part) -> set[tuple[int, int]]:
    """Every (layer, head) a canonical part holds."""
    assert part.heads is not None
    return set(itertools.product(range(*part.layers), range(*part.heads)))


def serves(need: Part, part: Part) -> set[tuple[int, int]]:
    """What of ``need`` can be scattered from ``part``: the same form, and natively all or none."""
    if part.form == need.form == "canonical":
        return cells(part) & cells(need)
    same = (part.form, part.layers, part.heads) == (need.form, need.layers, need.heads)
    return cells(need) if same else set()


@given(need=PARTS, parts=st.lists(PARTS, max_size=6, unique=True))
def test_a_cover_is_found_exactly_when_the_parts_hold_the_need(
    need: Part, parts: list[Part]
) -> None:
    found = plan.cover(need, parts)
    everything = set[tuple[int, int]]().union(*(serves(need, p) for p in parts))
    assert (found is not None) == (everything == cells(need))
    if found is not None:
        assert set(found) <= set(parts)
        assert set[tuple[int, int]]().union(*(serves(need, p) for p in found)) == cells(need)
        for one in found:  # every chosen part accepts and brings something of its own
            assert plan.accepts(need, one)
            assert serves(need, one)


@given(need=PARTS, parts=st.lists(PARTS, max_size=6, unique=True))
def test_one_part_that_holds_all_is_enough_and_the_first_such_part_is_taken(
    need: Part, parts: list[Part]
) -> None:
    whole = [p for p in parts if serves(need, p) == cells(need)]
    if whole:
        assert plan.cover(need, parts) == (whole[0],)


@given(need=PARTS, part=PARTS)
def test_a_part_is_accepted_exactly_when_it_serves_something(need: Part, part: Part) -> None:
    assert plan.accepts(need, part) == bool(serves(need, part))


def test_a_part_of_another_group_or_without_heads_is_not_accepted() -> None:
    need = Part(0, (0, 2), (0, 2))
    assert plan.accepts(need, need)
    assert not plan.accepts(need, Part(1, (0, 2), (0, 2)))
    assert not plan.accepts(need, Part(0, (0, 2), None))
    assert not plan.accepts(Part(0, (0, 2), None), need)


def test_parts_without_heads_cover_by_layers_alone() -> None:
    need = Part(0, (0, 4), None)
    halves = [Part(0, (0, 2), None), Part(0, (2, 4), None)]
    assert plan.cover(need, halves) == tuple(halves)
    assert plan.cover(need, halves[:1]) is None
    assert plan.cover(need, []) is None


@given(heads=st.integers(1, 16), ranks=st.integers(1, 4), shards=st.integers(0, 16))
def test_cuts_of_all_ranks_tile_the_heads_in_equal_shards(
    heads: int, ranks: int, shards: int
) -> None:
    assume(heads % ranks == 0)
    group, each = mha(heads), heads // ranks
    layouts = [
        GroupLayout(group, NHD, heads=(rank * each, (rank + 1) * each)) for rank in range(ranks)
    ]
    width = max(heads // shards, 1) if shards else each
    if heads % width or each % width:  # the rank's heads are not whole shards
        with pytest.raises(LayoutError, match="equal shards"):
            plan.cut(0, layouts[-1], shards)
        return
    parts = [part for layout in layouts for part in plan.cut(0, layout, shards)]
    edges = [p.heads for p in parts if p.heads is not None]
    assert [h for lo, hi in edges for h in range(lo, hi)] == list(range(heads))
    assert len({hi - lo for lo, hi in edges}) == 1
    assert {p.layers for p in parts} == {(0, LAYERS)}


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_ranks_of_every_size_write_the_same_parts(ranks: int) -> None:
    """With ``head_shards`` the multiple of all sizes, TP=1, 2, 4 and 8 read each other."""
    each = HEADS // ranks
    parts = [
        part
        for rank in range(ranks)
        for part in plan.cut(0, GroupLayout(mha(), NHD, heads=(rank * each, (rank + 1) * each)), 8)
    ]
    assert parts == [Part(0, (0, LAYERS), (h, h + 1)) for h in range(HEADS)]


def test_what_has_no_heads_or_is_native_is_never_cut() -> None:
    latent = KVGroup(AttentionKind.MLA, (0, 1), "float16", head_size=8)
    assert plan.cut(0, GroupLayout(latent, MLA_BLOCKS), 4) == [Part(0, (0, 2), None)]
    native = GroupLayout(mha(), NHD, 4, form="native:x")
    assert plan.cut(0, native, 4) == [Part(0, (0, LAYERS), (0, HEADS), "native:x")]
    assert plan.cut(0, GroupLayout(mha(), NHD), 0) == [Part(0, (0, LAYERS), (0, HEADS))]


# -- the longest usable prefix ------------------------------------------------------------------


def group(window: int | None, rule: HitRule = HitRule.TRAILING) -> KVGroup:
    if window is None:
        return KVGroup(AttentionKind.MHA, (0,), "float16", 1, 8)
    return KVGroup(AttentionKind.MHA, (0,), "float16", 1, 8, hit_rule=rule, window_tokens=window)


STATE = KVGroup(AttentionKind.STATE, (0,), "float32", state_nbytes=8)

some_groups = (
    st.just(group(None))
    | st.builds(group, st.integers(1, 40))
    | st.builds(group, st.integers(1, 40), st.just(HitRule.CHUNKED))
    | st.just(STATE)
)


def attended(one: KVGroup, stop: int) -> range:
    """The definition: the tokens before ``stop`` that the model looks at when it goes on there."""
    window = one.window_tokens or 1
    match one.hit_rule:
        case HitRule.EVERY_CHUNK:
            return range(stop)
        case HitRule.TRAILING:
            return range(max(stop - window, 0), stop)
        case HitRule.CHUNKED:
            return range(stop // window * window, stop)
        case HitRule.BOUNDARY:
            return range(stop - 1, stop)


def is_usable(stops: list[int], count: int, groups: list[KVGroup], there: list[list[bool]]) -> bool:
    """The definition, token by token: what a model needs of each group to go on after ``stop``."""
    starts = [0, *stops]
    for g, one in enumerate(groups):
        for token in attended(one, stops[count - 1]):
            span = next(i for i in range(count) if starts[i] <= token < stops[i])
            if not there[span][g]:
                return False
    return True


@given(
    widths=st.lists(st.sampled_from([4, 4, 4, 1, 7]), max_size=9),
    groups=st.lists(some_groups, min_size=1, max_size=3),
    holes=st.sets(st.tuples(st.integers(0, 8), st.integers(0, 2)), max_size=14),
)
def test_the_prefix_is_the_longest_that_every_group_can_go_on_from(
    widths: list[int], groups: list[KVGroup], holes: set[tuple[int, int]]
) -> None:
    stops = list(itertools.accumulate(widths))
    there = [[(i, g) not in holes for g in range(len(groups))] for i in range(len(stops))]
    found = plan.prefix(stops, groups, lambda i, g: there[i][g])
    longest = max(
        (n for n in range(1, len(stops) + 1) if is_usable(stops, n, groups, there)), default=0
    )
    assert found == longest


@given(one=some_groups, stop=st.integers(1, 300))
def test_what_a_hit_needs_is_what_the_model_looks_at_and_never_falls(
    one: KVGroup, stop: int
) -> None:
    assert one.first_needed(stop) == attended(one, stop).start
    assert one.first_needed(stop) <= one.first_needed(stop + 1)
    assert one.first_needed(0) == 0


def test_a_state_needs_only_the_last_chunk() -> None:
    assert plan.prefix([4, 8, 12], [STATE], lambda i, _: i == 2) == 3
    assert plan.prefix([4, 8, 12], [STATE], lambda i, _: i == 1) == 2
    assert plan.prefix([4, 8, 12], [STATE], lambda _i, _g: False) == 0
    assert STATE.first_needed(12) == 11
    assert group(100).first_needed(12) == 0


def test_a_hit_that_ends_with_an_attention_chunk_needs_nothing_of_it() -> None:
    chunked = group(8, HitRule.CHUNKED)
    assert plan.prefix([4, 8, 12], [chunked], lambda _i, _g: False) == 2
    assert plan.prefix([4, 8, 12], [chunked], lambda i, _: i == 2) == 3
    assert plan.prefix([4, 8, 12, 16], [chunked], lambda i, _: i == 2) == 4


def test_the_end_of_a_long_prefix_is_found_without_a_look_at_the_rest() -> None:
    window = group(64)
    asked = set[int]()

    def stop_of(i: int) -> int:
        asked.add(i)
        return 16 * (i + 1)

    assert plan.ending(10_000, stop_of, [window], lambda i, _: i != 9_999) == 9_999
    assert min(asked) >= 9_990
