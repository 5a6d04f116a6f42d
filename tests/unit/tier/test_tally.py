"""A piece is there when all ranks with a share in it say so; one failure is everybody's."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvlayer.errors import LayoutError, MessageError
from kvlayer.identity.keys import ObjectKey, Part
from kvlayer.layout import MLA_BLOCKS, NHD, AttentionKind, KVGroup, KVLayout
from kvlayer.results import Cause
from kvlayer.tier.messages import Outcome, Piece, Verb
from kvlayer.tier.planner import plan
from kvlayer.tier.ranks.tally import Tally, shares

GROUP = KVGroup(AttentionKind.MHA, tuple(range(4)), "float32", 4, 8)
LATENT = KVGroup(AttentionKind.MLA, tuple(range(4)), "float32", head_size=8)


def piece(number: int, part: Part) -> Piece:
    return Piece(
        ObjectKey.of("ab" * 32, "0", number.to_bytes(32, "big"), 16, part), 16 * number, 16, 0, 4096
    )


def parts(*layouts: KVLayout) -> list[list[Part]]:
    return [[plan.rank_part(i, g) for i, g in enumerate(each.groups)] for each in layouts]


def numbers(found: dict[int, list[Piece]]) -> dict[int, list[int]]:
    return {rank: [each.first_token // 16 for each in its] for rank, its in found.items()}


def tp(heads: tuple[int, int], layers: tuple[int, int] | None = None) -> KVLayout:
    return KVLayout.single(GROUP, NHD, heads=heads, layers=layers)


def test_each_rank_gathers_its_own_heads_and_layers() -> None:
    ranks = parts(tp((0, 2), (0, 2)), tp((2, 4), (0, 2)), tp((0, 2), (2, 4)), tp((2, 4), (2, 4)))
    pieces = [piece(i, rank[0]) for i, rank in enumerate(ranks)]
    assert numbers(shares(Verb.GATHER, pieces, ranks)) == {0: [0], 1: [1], 2: [2], 3: [3]}
    assert numbers(shares(Verb.SCATTER, pieces, ranks)) == {0: [0], 1: [1], 2: [2], 3: [3]}


def test_what_other_fleets_cut_otherwise_is_scattered_by_all_that_need_some_of_it() -> None:
    ranks = parts(tp((0, 2)), tp((2, 4)))
    pieces = [
        piece(0, Part(0, (0, 4), (0, 4))),
        piece(1, Part(0, (0, 4), (1, 3))),
        piece(2, Part(0, (0, 4), (3, 4))),
    ]
    assert numbers(shares(Verb.SCATTER, pieces, ranks)) == {0: [0, 1], 1: [0, 1, 2]}
    assert numbers(shares(Verb.GATHER, pieces, ranks)) == {1: [2]}


def test_what_is_replicated_is_gathered_once_and_scattered_everywhere() -> None:
    ranks = parts(*[KVLayout.single(LATENT, MLA_BLOCKS)] * 3)
    whole = piece(0, Part(0, (0, 4), None))
    assert numbers(shares(Verb.GATHER, [whole], ranks)) == {0: [0]}
    assert numbers(shares(Verb.SCATTER, [whole], ranks)) == {0: [0], 1: [0], 2: [0]}


def test_a_piece_without_anybodys_share_is_missed() -> None:
    lonely = piece(0, Part(0, (0, 4), (0, 4)))
    ranks = parts(tp((0, 2)))
    tally = Tally([lonely], shares(Verb.GATHER, [lonely], ranks))
    assert tally.is_done
    assert [outcome.cause for outcome in tally.missed()] == [Cause.RANK_DOWN]


@given(
    shared=st.dictionaries(st.integers(0, 3), st.sets(st.integers(0, 5), min_size=1), min_size=1),
    failing=st.sets(st.tuples(st.integers(0, 3), st.integers(0, 5))),
    order=st.randoms(use_true_random=False),
)
def test_it_is_done_after_the_last_report_and_knows_every_failure(
    shared: dict[int, set[int]], failing: set[tuple[int, int]], order: random.Random
) -> None:
    pieces = [piece(i, Part(0, (0, 4), (0, 4))) for i in sorted(set().union(*shared.values()))]
    by_number = {each.first_token // 16: each for each in pieces}
    tally = Tally(pieces, {rank: [by_number[i] for i in its] for rank, its in shared.items()})
    reports = [(rank, i) for rank, its in shared.items() for i in its]
    order.shuffle(reports)
    for rank, i in reports:
        assert not tally.is_done
        cause = Cause.RANK_DOWN if (rank, i) in failing else None
        tally.report(rank, [Outcome(by_number[i].key, cause, f"rank {rank}")])
    assert tally.is_done
    missed = {outcome.key for outcome in tally.missed()}
    assert missed == {by_number[i].key for rank, i in reports if (rank, i) in failing}


def test_what_a_rank_does_not_owe_counts_nothing() -> None:
    one, two = piece(1, Part(0, (0, 4), (0, 4))), piece(2, Part(0, (0, 4), (0, 4)))
    tally = Tally([one, two], {0: [one, two], 1: [two]})
    strange = [
        (1, [two.key, one.key]),
        (0, [one.key, one.key]),
        (5, [two.key]),
        (1, [two.key, ObjectKey("else")]),
    ]
    for rank, keys in strange:
        with pytest.raises(MessageError) as caught:
            tally.report(rank, [Outcome(key) for key in keys])
        assert caught.value.hint
    tally.report(0, [Outcome(one.key), Outcome(two.key)])
    with pytest.raises(MessageError):
        tally.report(0, [Outcome(one.key)])
    assert not tally.is_done
    tally.report(1, [Outcome(two.key)])
    assert tally.is_done and tally.missed() == []


# -- what the ranks of a planner may be -----------------------------------------------------------


def whole(**how: object) -> KVLayout:
    return KVLayout.single(GROUP, NHD, **how)  # type: ignore[arg-type]


def test_ranks_write_what_they_hold_and_together_all_of_it() -> None:
    assert plan.cuts(whole(), [tp((0, 2)), tp((2, 4))], 0) == [
        [Part(0, (0, 4), (0, 2)), Part(0, (0, 4), (2, 4))]
    ]
    assert len(plan.cuts(whole(), [tp((0, 2)), tp((2, 4))], 4)[0]) == 4
    stages = [tp((0, 4), (0, 2)), tp((0, 4), (2, 4))]
    assert plan.cuts(whole(), stages, 0) == [[Part(0, (0, 2), (0, 4)), Part(0, (2, 4), (0, 4))]]
    replicated = KVLayout.single(LATENT, MLA_BLOCKS)
    assert plan.cuts(replicated, [replicated] * 4, 0) == [[Part(0, (0, 4), None)]]


@pytest.mark.parametrize(
    "ranks",
    [
        [tp((0, 2))],
        [tp((0, 2)), tp((3, 4))],
        [tp((0, 4), (0, 2))],
        [KVLayout.single(LATENT, MLA_BLOCKS)],
        [
            KVLayout.single(GROUP, NHD, heads=(0, 2), form="native:x"),
            KVLayout.single(GROUP, NHD, heads=(2, 4), form="native:x"),
        ],
    ],
    ids=["half", "a hole", "first layers", "another model", "native halves"],
)
def test_ranks_that_do_not_hold_what_is_planned_for_are_refused(ranks: list[KVLayout]) -> None:
    form = ranks[0].groups[0].form
    with pytest.raises(LayoutError) as caught:
        plan.cuts(whole(form=form), ranks, 0)
    assert caught.value.hint


def test_a_rank_may_not_hold_more_than_is_planned_for() -> None:
    with pytest.raises(LayoutError):
        plan.cuts(tp((0, 2)), [whole()], 0)
