"""Questions about states, which are at few ends: backwards, several at a time, and no last word."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import pytest
from asked import FULL, Tiers, key, long_chain, long_planner
from stacks import CHUNK, Rig, chain_of, check_accounts, make_rig, states_layout

from kvlayer.abc.backend import SizeResult
from kvlayer.errors import BackendError
from kvlayer.identity.keys import ChunkChain, ObjectKey, Part
from kvlayer.layout import KVView
from kvlayer.results import Cause, RetrieveReport
from kvlayer.tier.stack import Window

ONE, OTHER = Part(1, (0, 1), None), Part(2, (0, 1), None)
STATES = (ONE, OTHER)


def states(chain: ChunkChain, ends: Iterable[int], *parts: Part) -> list[ObjectKey]:
    """The states after so many chunks; of all groups unless some are named."""
    return [key(chain, chain.span(end - 1), part) for end in ends for part in parts or STATES]


# -- how much is asked -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ends", "tokens", "keys", "rounds"),
    [
        ([512], 512, 62, 2),  # 30 about chunks and tails, then the last 16 states of each group
        ([497], 497, 62, 2),
        ([496], 496, 94, 3),
        ([300, 100], 300, 542, 6),  # each round goes as far back again as all before it
        ([1], 1, 1054, 7),
        ([], 0, 1054, 7),  # every state once
    ],
)
def test_a_state_of_a_long_prompt_is_found_in_few_rounds(
    ends: list[int], tokens: int, keys: int, rounds: int
) -> None:
    planner, chain = long_planner(states_layout()), long_chain(131_072)
    held = [key(chain, span) for span in chain.spans(512)] + states(chain, ends)
    tiers = Tiers(planner, held, ())
    assert tiers.look(chain).tokens == 256 * tokens
    assert (tiers.keys, len(tiers.asked)) == (keys, rounds)
    asked = [each for some in tiers.asked for each in some]
    assert len(set(asked)) == len(asked)


def test_states_are_asked_about_only_as_far_as_attention_goes() -> None:
    planner, chain = long_planner(states_layout()), long_chain(131_072)
    held = [key(chain, span) for span in chain.spans(40)] + states(chain, [33, 300, 512])
    tiers = Tiers(planner, held, ())
    assert tiers.look(chain).tokens == 256 * 33
    hashes = {chain.hashes[index] for index in range(40, 512)}
    beyond = [k for some in tiers.asked for k in some if k.end_hash in hashes]
    assert {k.part for k in beyond} == {FULL}


def test_a_state_that_one_group_lacks_ends_nothing_and_the_search_goes_on() -> None:
    planner, chain = long_planner(states_layout()), long_chain(131_072)
    held = [key(chain, span) for span in chain.spans(512)] + states(chain, [200])
    held += [*states(chain, [510, 450], ONE), *states(chain, [511, 300], OTHER)]
    assert Tiers(planner, held, ()).look(chain).tokens == 256 * 200


def test_one_tier_may_have_the_attention_and_another_one_the_states() -> None:
    planner, chain = long_planner(states_layout()), long_chain(131_072)
    attention = [key(chain, span) for span in chain.spans(512)]
    one, other = states(chain, [490], ONE), states(chain, [490], OTHER)
    assert Tiers(planner, attention + one, other).look(chain).tokens == 256 * 490


def test_the_state_of_a_tail_is_asked_about_with_the_tail() -> None:
    planner, chain = long_planner(states_layout()), long_chain(131_172)
    tail = chain.tails(512)[0]
    held = [key(chain, span) for span in [*chain.spans(512), tail]]
    held += [key(chain, tail, part) for part in STATES]
    tiers = Tiers(planner, held, ())
    assert tiers.look(chain).tokens == 131_168
    assert len(tiers.asked) == 2  # and about no state before it


def test_a_tail_without_all_its_states_ends_nothing() -> None:
    planner, chain = long_planner(states_layout()), long_chain(131_172)
    tail = chain.tails(512)[0]
    held = [key(chain, span) for span in [*chain.spans(512), tail]] + [key(chain, tail, ONE)]
    assert Tiers(planner, [*held, *states(chain, [300])], ()).look(chain).tokens == 256 * 300


def test_states_that_are_known_already_are_not_asked_about() -> None:
    planner, chain = long_planner(states_layout()), long_chain(131_072)
    held = [key(chain, span) for span in chain.spans(512)] + states(chain, [500, 400])
    tiers = Tiers(planner, held, ())
    planner.note(held, 1)
    assert tiers.look(chain).tokens == 256 * 500
    asked = [k for some in tiers.asked for k in some]
    assert {*asked} == {*states(chain, [*range(497, 500), *range(501, 513)])}


# -- with a backend --------------------------------------------------------------------------------


async def stored_by_others(chain: ChunkChain, ends: Iterable[int]) -> Rig:
    """A stack over a tier that has all attention of a prompt, and states at these ends."""
    rig = make_rig(layout=states_layout(), shared=True, pages=256)
    await rig.send_down(chain)
    kept = {*states(chain, ends)}
    for name in [*rig.backend.objects]:
        if name.part != FULL and name not in kept:
            del rig.backend.objects[name]
    rig.planner.vanished([r.key for r in [*rig.planner.directory.objects()]], 1, "")
    rig.clock.now += 10.0
    rig.backend.calls.clear()
    return rig


async def load(rig: Rig, chain: ChunkChain) -> tuple[int, RetrieveReport]:
    match, lease = await rig.stack.finder.lease(chain, owner="", seconds=1e9)
    rig.stager.scattered.clear()
    view = KVView([], [range(chain.num_tokens)] * 3)
    window = Window(0, chain.num_tokens)
    report = await rig.stack.retrieve(match, view, window, lease=lease)
    rig.planner.release(lease.number)
    await rig.settled()
    check_accounts(rig.planner, idle=True)
    return match.tokens, report


def brought(rig: Rig) -> list[int]:
    """Where the states that were scattered end, those of both groups."""
    ends = [[f + n for part, f, n, _ in rig.stager.scattered if part == s] for s in STATES]
    assert ends[0] == ends[1]
    return ends[0]


@pytest.mark.asyncio
async def test_a_state_that_a_tier_only_says_it_has_brings_nothing_and_then_the_one_before_it() -> (
    None
):
    chain = chain_of(CHUNK * 40)
    rig = await stored_by_others(chain, [7, 21])
    real = rig.backend.contains
    lies = {*states(chain, [38])}

    async def contains(keys: Sequence[ObjectKey], /) -> list[SizeResult]:
        sizes = await real(keys)
        return [8192 if k in lies else size for k, size in zip(keys, sizes, strict=True)]

    rig.backend.contains = contains  # type: ignore[method-assign]
    for _ in range(2):  # as often as it says so
        found, report = await load(rig, chain)
        assert (found, report.tokens) == (CHUNK * 38, 0)
        assert {failure.cause for failure in report.failed} == {Cause.VANISHED}
    lies.clear()
    assert await load(rig, chain) == (CHUNK * 21, RetrieveReport(CHUNK * 21))
    assert brought(rig) == [CHUNK * 21]
    await rig.aclose()


@pytest.mark.asyncio
@pytest.mark.parametrize("group", [1, 2])
async def test_a_state_that_is_damaged_brings_nothing_and_then_the_one_before_it(
    group: int,
) -> None:
    chain = chain_of(CHUNK * 40)
    rig = await stored_by_others(chain, [7, 21])
    (name,) = states(chain, [21], STATES[group - 1])
    stored = bytearray(rig.backend.objects[name])
    stored[4096] ^= 1
    rig.backend.objects[name] = bytes(stored)
    found, report = await load(rig, chain)
    assert (found, report.tokens) == (CHUNK * 21, 0)
    assert [failure.cause for failure in report.failed] == [Cause.CORRUPT]
    assert await load(rig, chain) == (CHUNK * 7, RetrieveReport(CHUNK * 7))
    assert brought(rig) == [CHUNK * 7]
    await rig.aclose()


@pytest.mark.asyncio
async def test_a_state_that_cannot_be_looked_at_is_passed_over_and_found_later() -> None:
    chain = chain_of(CHUNK * 40)
    rig = await stored_by_others(chain, [7, 21])
    real, bad = rig.backend.contains, {*states(chain, [21], OTHER)}

    async def contains(keys: Sequence[ObjectKey], /) -> list[SizeResult]:
        sizes: list[SizeResult] = [*await real(keys)]
        for at, asked in enumerate(keys):
            if asked in bad:
                sizes[at] = BackendError("unreadable")
        return sizes

    rig.backend.contains = contains  # type: ignore[method-assign]
    assert (await load(rig, chain))[0] <= CHUNK * 7
    bad.clear()
    rig.clock.now += 10.0
    assert (await load(rig, chain))[0] == CHUNK * 21
    await rig.aclose()


@pytest.mark.asyncio
async def test_absent_states_are_not_asked_about_again_within_a_second() -> None:
    chain = chain_of(CHUNK * 40)
    rig = await stored_by_others(chain, [])
    assert (await rig.stack.finder.find(chain)).tokens == 0
    await load(rig, chain)
    asked = rig.backend.count("contains")
    assert (await load(rig, chain))[0] == 0
    leased = rig.stack.finder.lease_at_once(chain, owner="", seconds=1.0)
    assert leased is not None and leased[0].tokens == 0  # nobody has to be asked
    assert rig.backend.count("contains") == asked
    await rig.aclose()
