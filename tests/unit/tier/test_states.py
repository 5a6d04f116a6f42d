"""Loads of models with states: all of the longest hit that ends at one, or nothing of it."""

from __future__ import annotations

import asyncio
import math
from array import array
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from stacks import (
    CHUNK,
    NAMESPACE,
    TAIL,
    Rig,
    chain_of,
    check_accounts,
    chunked_layout,
    full_group,
    hybrid_layout,
    make_rig,
    pattern,
    state_group,
    states_layout,
)

from kvlayer._steps import finish
from kvlayer.errors import BackendUnavailableError
from kvlayer.identity.epoch import Epoch
from kvlayer.identity.keys import ChunkChain, ObjectKey, Part, Scope
from kvlayer.identity.quality import Accepted
from kvlayer.layout import STATE_BLOCKS, GroupLayout, KVLayout, KVView
from kvlayer.results import Cause, RetrieveReport
from kvlayer.testing.sim import in_virtual_time
from kvlayer.tier.planner import plan
from kvlayer.tier.planner.lease import Lease
from kvlayer.tier.planner.match import Match
from kvlayer.tier.planner.records import HostState
from kvlayer.tier.stack import Window

FULL, ONE, OTHER = 0, 1, 2
FINE = "ef" * 32
EPOCH = Epoch(NAMESPACE)


def keep(rig: Rig, chain: ChunkChain, ends: Iterable[int], *, tail: bool = False) -> None:
    """Put a prompt into host memory, with states after so many tokens, and local attention."""
    at = {*ends}
    groups = [layout.group for layout in rig.planner.layout.groups]

    def holds(group: int, span: Any) -> bool:
        return groups[group].state_nbytes == 0 or span.stop in at

    todo = rig.planner.plan_store(chain, 0, tail=tail, holds=holds)
    rig.write_into(todo.gathers)
    rig.planner.stored(todo.gathers, ok=True)
    rig.planner.settle(chain, todo.gathers)


async def keep_below(rig: Rig, chain: ChunkChain, ends: Iterable[int]) -> None:
    """The same on the tier alone."""
    keep(rig, chain, ends)
    records = [*rig.planner.directory.objects()]
    await rig.stack.spills.start([(r.chunk.span, r) for r in records], [])
    await rig.stack.spills.flush()
    rig.planner.evict(records, Cause.CLEARED, "")
    rig.backend.calls.clear()


def lose(rig: Rig, chain: ChunkChain, end: int, *groups: int) -> None:
    """What these groups have of the chunk that ends there goes from all tiers."""
    hash_ = chain.hashes[end // CHUNK - 1]
    records = [r for r in rig.planner.directory.objects() if r.chunk.hash == hash_]
    gone = [r for r in records if r.part.group in groups]
    assert len(gone) == len(groups)
    rig.planner.evict(gone, Cause.EVICTED, "")
    rig.planner.vanished([r.key for r in gone], 1, "")


async def looked_up(rig: Rig, chain: ChunkChain) -> tuple[Match, Lease]:
    return await rig.stack.finder.lease(chain, owner="", seconds=5.0)


async def load(
    rig: Rig, match: Match, lease: Lease | None, slots: Sequence[Any], first: int = 0
) -> RetrieveReport:
    rig.stager.scattered.clear()
    rig.stager.bytes.clear()
    window = Window(first, first + len(slots[0]))
    return await rig.stack.retrieve(match, KVView([], slots), window, lease=lease)


def states(rig: Rig) -> list[tuple[int, int]]:
    """Group and end of each state that was scattered; every byte that was is right."""
    for (part, first, count, _), host in zip(rig.stager.scattered, rig.stager.bytes, strict=True):
        payload = rig.planner.payload(part, count)
        nbytes = payload.num_layers * payload.layer_nbytes  # host memory is whole pages
        assert host[:nbytes] == pattern(first, part, nbytes)
    groups = rig.planner.layout.groups
    return [
        (part.group, first + count)
        for part, first, count, _ in rig.stager.scattered
        if groups[part.group].group.state_nbytes
    ]


def some(count: int, *ends: int) -> list[int]:
    """Slots of states after the tokens before these ends."""
    return [at if at + 1 in ends else -1 for at in range(count)]


# -- a hit that became shorter ---------------------------------------------------------------------


KINDS: list[Callable[[list[int]], Any]] = [
    list,
    lambda slots: array("q", slots),
    lambda slots: np.array(slots, dtype=np.int32),
    torch.tensor,
]


@pytest.mark.asyncio
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("places", [[48, 96], [48], [96], []])
async def test_a_hit_that_became_shorter_is_loaded_where_the_view_has_its_state(
    kind: Callable[[list[int]], Any], places: list[int]
) -> None:
    rig, chain = make_rig(layout=states_layout()), chain_of(96)
    keep(rig, chain, [48, 96])
    match, lease = await looked_up(rig, chain)
    assert match.tokens == 96
    rig.clock.now += 10.0  # the lease has run out
    finish(rig.planner.expiring())
    lose(rig, chain, 96, OTHER)
    report = await load(
        rig, match, lease, [range(96), kind(some(96, 96, *places)), kind(some(96, *places))]
    )
    if 48 in places:
        assert (report.tokens, states(rig)) == (48, [(ONE, 48), (OTHER, 48)])
    else:
        (failure,) = report.failed
        assert (report.tokens, failure.cause, failure.span) == (0, Cause.VANISHED, match.spans[0])
        assert "token 48, and the view has no slots" in failure.detail
        assert rig.stager.scattered == []
        assert rig.stack.host.misses[Cause.VANISHED] == 1
    await rig.stack.flush()
    check_accounts(rig.planner, idle=True)
    await rig.aclose()


@pytest.mark.asyncio
@pytest.mark.parametrize(("group", "tokens"), [(ONE, 0), (OTHER, 0), (None, 48)])
async def test_no_group_of_states_may_lack_a_slot(group: int | None, tokens: int) -> None:
    rig, chain = make_rig(layout=states_layout()), chain_of(48)
    keep(rig, chain, [48])
    match, lease = await looked_up(rig, chain)
    slots = [range(48), some(48, 48), some(48, 48)]
    if group is not None:
        slots[group] = some(48, 32)
    assert (await load(rig, match, lease, slots)).tokens == tokens
    await rig.aclose()


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("local", "first", "tokens"),
    [
        (range(28, 48), 0, 48),  # the window of the shorter hit: 20 tokens
        (range(29, 48), 0, 0),
        (range(28, 47), 0, 0),
        (range(76, 96), 0, 0),  # that of the longer one
        (range(32, 48), 32, 48),  # what lies before the view the engine has
        (range(33, 48), 32, 32),
    ],
)
async def test_a_hit_that_became_shorter_is_loaded_where_the_view_has_its_window(
    local: range, first: int, tokens: int
) -> None:
    rig, chain = make_rig(layout=hybrid_layout(20)), chain_of(96)
    keep(rig, chain, [48, 96])
    match, lease = await looked_up(rig, chain)
    rig.clock.now += 10.0
    finish(rig.planner.expiring())
    lose(rig, chain, 96, 2)
    count = 96 - first
    window = [at if at + first in local else -1 for at in range(count)]
    report = await load(rig, match, lease, [range(count), window, range(count)], first)
    assert report.tokens == tokens
    assert bool(report.failed) == (tokens < 48)
    assert {span.start for span in (f.span for f in report.failed)} <= {first // CHUNK * CHUNK}
    assert bool(rig.stager.scattered) == (tokens == 48)
    await rig.aclose()


@pytest.mark.asyncio
@pytest.mark.parametrize("has_local", [False, True])
@pytest.mark.parametrize("end", [48, 80])
async def test_a_view_needs_slots_only_for_the_unfinished_attention_chunk(
    end: int, has_local: bool
) -> None:
    rig, chain = make_rig(layout=chunked_layout(48)), chain_of(112)
    keep(rig, chain, [end, 112])
    match, lease = await looked_up(rig, chain)
    assert match.tokens == 112
    rig.clock.now += 10.0
    finish(rig.planner.expiring())
    lose(rig, chain, 112, 2)
    local = [at if at >= (48 if has_local else 96) else -1 for at in range(112)]
    report = await load(rig, match, lease, [range(112), local, range(112)])
    # A hit of 48 tokens ends with an attention chunk, and needs nothing of it.
    assert report.tokens == (end if has_local or end == 48 else 0)
    await rig.aclose()


@pytest.mark.asyncio
async def test_a_hit_that_ends_before_the_view_brings_nothing_and_misses_no_place() -> None:
    rig, chain = make_rig(layout=states_layout()), chain_of(96)
    keep(rig, chain, [48, 96])
    match, lease = await looked_up(rig, chain)
    rig.clock.now += 10.0
    finish(rig.planner.expiring())
    lose(rig, chain, 96, ONE)
    report = await load(rig, match, lease, [range(32), some(32, 32), some(32, 32)], first=64)
    assert report == RetrieveReport(64)
    assert not rig.stager.scattered and not rig.stack.host.misses[Cause.VANISHED]
    await rig.aclose()


# -- half of what it needs -------------------------------------------------------------------------


@pytest.mark.asyncio
@pytest.mark.parametrize(("end", "group"), [(32, FULL), (96, FULL), (96, ONE), (96, OTHER)])
async def test_a_load_that_misses_anything_brings_nothing(end: int, group: int) -> None:
    """Also where an earlier state is there: the view was lent for the later one."""
    rig, chain = make_rig(layout=states_layout()), chain_of(96)
    await keep_below(rig, chain, [48, 96])
    match, lease = await looked_up(rig, chain)
    (key,) = [
        k
        for k in rig.backend.objects
        if k.part.group == group and k.end_hash == chain.hashes[end // CHUNK - 1]
    ]
    del rig.backend.objects[key]
    report = await load(rig, match, lease, [range(96)] * 3)
    assert (report.tokens, report.failed[0].cause) == (0, Cause.VANISHED)
    rig.planner.release(lease.number)
    match, lease = await looked_up(rig, chain)
    assert match.tokens == (0 if end == 32 else 48)
    report = await load(rig, match, lease, [range(96)] * 3)
    assert report == RetrieveReport(match.tokens)
    assert states(rig) == ([(ONE, 48), (OTHER, 48)] if match.tokens else [])
    await rig.aclose()


@pytest.mark.asyncio
@pytest.mark.parametrize("passed", range(8))
async def test_a_load_that_is_cancelled_leaves_nothing_held(passed: int) -> None:
    rig, chain = make_rig(layout=states_layout()), chain_of(96)
    await keep_below(rig, chain, [48, 96])
    match, lease = await looked_up(rig, chain)
    real, left = rig.backend._pass, passed

    async def some_pass() -> None:
        nonlocal left
        left -= 1
        if left < 0:
            await real()

    rig.backend._pass = some_pass  # type: ignore[method-assign]
    rig.backend.gate = asyncio.Event()
    loading = asyncio.create_task(load(rig, match, lease, [range(96)] * 3))
    await rig.backend.arrived.wait()
    loading.cancel()
    await asyncio.wait({loading})
    assert loading.cancelled()
    rig.planner.release(lease.number)
    rig.backend.gate.set()
    await rig.settled()
    check_accounts(rig.planner, idle=True)
    match, lease = await looked_up(rig, chain)
    assert await load(rig, match, lease, [range(96)] * 3) == RetrieveReport(96)
    assert states(rig) == [(ONE, 96), (OTHER, 96)]
    await rig.aclose()


# -- into host memory ------------------------------------------------------------------------------


@pytest.mark.asyncio
async def test_what_is_held_is_the_longest_hit_with_its_own_state() -> None:
    rig, chain = make_rig(layout=states_layout()), chain_of(112)
    await keep_below(rig, chain, [48, 96])
    lease, report = await rig.stack.hold(chain, owner="", seconds=5.0)
    assert report == RetrieveReport(96)
    brought = [key for what, key in rig.backend.calls if what == "get"]
    ends = {hash_: (at + 1) * CHUNK for at, hash_ in enumerate(chain.hashes)}
    assert sorted((k.part.group, ends[k.end_hash]) for k in brought) == [
        *((FULL, end) for end in range(16, 112, 16)),
        (ONE, 96),
        (OTHER, 96),
    ]
    ready = [r for r in rig.planner.directory.objects() if r.host is HostState.READY]
    assert rig.planner.evict(ready, Cause.EVICTED, "") == []  # the lease holds all of it
    rig.planner.release(lease.number)
    assert len(rig.planner.evict(ready, Cause.EVICTED, "")) == 8
    check_accounts(rig.planner, idle=True)
    await rig.aclose()


@pytest.mark.asyncio
async def test_what_cannot_be_held_to_its_state_is_nothing() -> None:
    rig, chain = make_rig(layout=states_layout()), chain_of(96)
    await keep_below(rig, chain, [48, 96])
    for key in [*rig.backend.objects]:
        if key.part.group == OTHER and key.end_hash == chain.hashes[5]:
            del rig.backend.objects[key]
    lease, report = await rig.stack.hold(chain, owner="", seconds=5.0)
    assert (report.tokens, report.failed[0].cause) == (0, Cause.VANISHED)
    rig.planner.release(lease.number)
    _, report = await rig.stack.hold(chain, owner="", seconds=5.0)
    assert report == RetrieveReport(48)
    await rig.aclose()


# -- what is worth loading -------------------------------------------------------------------------


BIG = KVLayout(
    (
        states_layout().groups[0],
        GroupLayout(state_group(64 * 1024), STATE_BLOCKS, 4),
    )
)
"""A state takes as long to load as sixteen chunks of attention."""


def slow_rig(chain: ChunkChain, ends: Iterable[int], tokens_per_second: float) -> Rig:
    """A tier of 1 MB/s, which is thought to hold a prompt with states after so many chunks."""
    rig = make_rig(layout=BIG, pages=1024)
    at = {*ends}
    parts = [*rig.planner.directory.needs]
    rig.planner.note(
        [
            ObjectKey.of(NAMESPACE, chain.zone(span), span.hash, span.tokens, part)
            for count, span in enumerate(chain.spans(len(chain)), 1)
            for part in parts
            if part.group == FULL or count in at
        ],
        1,
    )
    for nbytes in (4096, 8192, 65536):
        rig.tier.estimate.observe(nbytes, nbytes / 1e6, rig.clock())
    rig.stack.prefill.observe(int(tokens_per_second), 1.0)
    return rig


def taken(rig: Rig, chain: ChunkChain) -> int:
    """Chunks of a hit that are taken."""
    leased = rig.stack.finder.lease_known(chain, owner="", seconds=1.0)
    rig.planner.release(leased[1].number)
    assert leased[0].tokens % CHUNK == 0
    return leased[0].tokens // CHUNK


def best(count: int, ends: Iterable[int], tokens_per_second: float) -> int:
    """By the definition: the end that saves most."""
    attention, state = 4096 / 1e6, 65536 / 1e6
    gains = {n: n * (CHUNK / tokens_per_second - attention) - state for n in ends if n <= count}
    most = max(gains, key=lambda n: gains[n], default=0)
    return most if most and gains[most] > 0 else 0


@pytest.mark.asyncio
@pytest.mark.parametrize("rate", [2000, 3000, 3500, 3880, 3900, 3990, 4500])
@pytest.mark.parametrize("every", [1, 8, 100])
async def test_a_hit_is_taken_to_the_state_that_saves_most_after_few_tries(
    every: int, rate: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    chain, ends = chain_of(CHUNK * 256), range(every, 257, every)
    rig = slow_rig(chain, ends, rate)
    walks = 0
    real = rig.planner.shortened

    def shortened(match: Match, count: int) -> Any:
        nonlocal walks
        walks += 1
        return real(match, count)

    monkeypatch.setattr(rig.planner, "shortened", shortened)
    assert taken(rig, chain) == best(256, ends, rate)
    assert walks <= 4 + math.log2(256) + 1
    await rig.aclose()


@pytest.mark.asyncio
@pytest.mark.parametrize("rate", [3880, 3980])  # a chunk more is worth it, or not even that
@pytest.mark.parametrize("resident", [4, 5, 64, 100, 200, 250])
async def test_a_state_in_host_memory_serves_where_loading_a_later_one_is_not_worth_it(
    resident: int, rate: int
) -> None:
    """However many ends lie between them."""
    chain = chain_of(CHUNK * 256)
    rig = slow_rig(chain, range(resident + 1, 257), rate)
    planner = rig.planner
    known = [record.key for record in planner.directory.objects()]
    planner.vanished(known, 1, "")
    keep(rig, chain.until(resident * CHUNK), [resident * CHUNK])
    planner.note(known, 1)
    assert planner.match(chain).tokens == 256 * CHUNK
    assert taken(rig, chain) == resident
    await rig.aclose()


@pytest.mark.asyncio
async def test_a_tier_that_serves_nobody_leaves_the_state_that_is_in_host_memory() -> None:
    rig, chain = make_rig(layout=states_layout()), chain_of(96, scope=Scope(memory_only=True))
    keep(rig, chain, [32, 64, 96])
    gone = [r for r in rig.planner.directory.objects() if r.part.group == OTHER]
    for record in gone:
        if record.chunk.hash in chain.hashes[3:]:
            rig.planner.directory.add_tier(record, 1)
            rig.planner.evict([record], Cause.EVICTED, "")
    assert rig.planner.match(chain).tokens == 96
    match, lease = await looked_up(rig, chain)
    assert match.tokens == 32
    rig.planner.release(lease.number)
    await rig.aclose()


@pytest.mark.asyncio
async def test_a_hit_that_is_shortened_ends_at_a_state() -> None:
    rig, chain = make_rig(layout=states_layout()), chain_of(96 + TAIL)
    keep(rig, chain, [16, 64, 96, 100], tail=True)
    match = rig.planner.match(chain)
    assert match.tokens == 100
    ends = [finish(rig.planner.shortened(match, count)).tokens for count in range(8)]
    assert ends == [0, 16, 16, 16, 64, 64, 96, 100]
    await rig.aclose()


# -- qualities -------------------------------------------------------------------------------------


def asking(chain: ChunkChain) -> ChunkChain:
    return chain.bound(EPOCH, accepts=(Accepted("fine", FINE),))


@pytest.mark.asyncio
async def test_a_hit_of_an_accepted_quality_ends_at_a_state_of_that_quality() -> None:
    rig, chain = make_rig(layout=states_layout()), chain_of(96)
    keep(rig, chain.until(48).bound(EPOCH), [32])

    def hit() -> tuple[int, str, int]:
        match = rig.planner.match(asking(chain))
        return match.tokens, match.quality, match.exact_tokens

    assert hit() == (32, "exact", 32)
    keep(rig, chain.bound(EPOCH, FINE), [])
    assert hit() == (32, "exact", 32)  # attention alone leads to no hit
    keep(rig, chain.bound(EPOCH, FINE), [80])
    assert hit() == (80, "fine", 48)
    assert rig.planner.match(chain.bound(EPOCH)).tokens == 32
    lose(rig, chain.named_in(FINE), 80, ONE)
    assert hit() == (32, "exact", 32)
    await rig.aclose()


@pytest.mark.asyncio
@pytest.mark.parametrize("hybrid", [states_layout, hybrid_layout])
async def test_exact_attention_is_not_stored_again_as_an_approximation(
    hybrid: Callable[[], KVLayout],
) -> None:
    """Exact chunks mostly lack the state, and the window, that no engine has kept."""
    rig, chain = make_rig(layout=hybrid()), chain_of(96)
    todo = rig.planner.plan_store(chain.bound(EPOCH), 0, tail=False, holds=lambda _, __: False)
    rig.planner.gathered(todo, ())
    rig.planner.settle(chain.bound(EPOCH), todo.gathers)
    fine = chain.bound(EPOCH, FINE)
    todo = rig.planner.plan_store(fine, 0, tail=False, holds=lambda _, span: span.stop == 96)
    assert [span.stop for span, _ in todo.skipped] == [16, 32, 48, 64, 80]
    assert {slot.span.stop for slot in todo.gathers} == {96}  # with its state it is another thing
    rig.planner.gathered(todo, ())
    rig.planner.settle(fine, todo.gathers)
    check_accounts(rig.planner, idle=True)
    await rig.aclose()


# -- ranks -----------------------------------------------------------------------------------------


def test_ranks_write_a_state_once_as_they_write_a_latent() -> None:
    """Every rank has all of it: what a rank has a share of has no name."""
    layout = states_layout()
    halves = [
        KVLayout(
            (
                GroupLayout(full_group(), layout.groups[0].axes, 4, heads=(rank, rank + 1)),
                *layout.groups[1:],
            )
        )
        for rank in range(2)
    ]
    cuts = plan.cuts(layout, halves, 2)
    assert [len(cut) for cut in cuts] == [2, 1, 1]
    assert cuts[ONE] == [Part(ONE, (0, 1), None)]


# -- tiers that fail -------------------------------------------------------------------------------


@in_virtual_time
async def test_a_tier_that_dies_between_lookup_and_load_is_a_miss() -> None:
    rig, chain = make_rig(layout=states_layout(), deadline=2.0), chain_of(96)
    await keep_below(rig, chain, [48, 96])
    match, lease = await looked_up(rig, chain)
    rig.backend.raises = BackendUnavailableError("gone")
    report = await load(rig, match, lease, [range(96)] * 3)
    assert report.tokens == 0 and report.failed
    rig.planner.release(lease.number)
    await rig.settled()
    check_accounts(rig.planner, idle=True)
    await rig.aclose()
