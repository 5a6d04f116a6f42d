"""Questions to tiers: few for a long prompt, each once at a time, and never the last word."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from contextlib import suppress

import pytest
from asked import FULL, STATE, WINDOW, Tiers, key, long_chain, long_planner
from hypothesis import given, settings
from hypothesis import strategies as st
from stacks import (
    CHUNK,
    Rig,
    chain_of,
    check_accounts,
    chunked_layout,
    hybrid_layout,
    make_planner,
    make_rig,
    pattern,
    plain_layout,
)

from kvlayer.abc.backend import SizeResult
from kvlayer.errors import BackendError
from kvlayer.identity.keys import ChunkChain, ObjectKey, Span
from kvlayer.layout import HitRule, KVGroup, KVLayout, KVView
from kvlayer.results import Cause
from kvlayer.testing.sim import in_virtual_time
from kvlayer.tier.planner.records import HostState
from kvlayer.tier.stack import Window

# -- how much is asked -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stored", "keys", "rounds"),
    [(0, 16, 1), (512, 16, 1), (1, 25, 3), (256, 53, 4), (300, 53, 4), (511, 53, 4)],
)
def test_a_long_prompt_costs_few_questions(stored: int, keys: int, rounds: int) -> None:
    planner, chain = long_planner(), long_chain(131_072)
    held = [key(chain, span) for span in chain.spans(stored)]
    tiers = Tiers(planner, held, ())
    assert tiers.look(chain).tokens == 256 * stored
    assert tiers.keys <= keys
    assert len(tiers.asked) <= rounds


def test_the_tail_of_a_warm_prompt_is_asked_about_with_few_questions_more() -> None:
    planner, chain = long_planner(), long_chain(131_172)
    held = [key(chain, span) for span in [*chain.spans(512), chain.tails(512)[0]]]
    tiers = Tiers(planner, held, ())
    assert tiers.look(chain).tokens == 131_168
    assert tiers.keys <= 32 and len(tiers.asked) <= 4


def test_a_caller_may_have_every_chunk_asked_about() -> None:
    planner, chain = make_planner(tiers=3), chain_of(CHUNK * 40)
    spans = chain.spans(40)
    held = [key(chain, span) for span in spans if span is not spans[20]]
    tiers = Tiers(planner, held, ())
    assert tiers.look(chain, every=True).tokens == CHUNK * 20
    assert tiers.asked[0] == [
        *(key(chain, span) for span in spans),
        *(key(chain, tail) for tail in chain.tails(0)),
    ]
    assert tiers.asked[1:] == [[key(chain, tail) for tail in chain.tails(20)]]


# -- what is presumed ------------------------------------------------------------------------------


def test_what_nobody_was_asked_about_is_presumed_as_long_as_it_is_leased() -> None:
    planner, chain = make_planner(tiers=3), chain_of(CHUNK * 40)
    tiers = Tiers(planner, [key(chain, span) for span in chain.spans(40)], ())
    match = tiers.look(chain)
    assert match.tokens == chain.num_tokens
    seen = {k for keys in tiers.asked for k in keys}
    presumed = [found for found in match.path() if found.key not in seen]
    assert len(presumed) > 20
    assert all(not found.tiers and found.presumed == 1 << 1 for found in presumed)
    assert planner.directory.held(1) == 40 - len(presumed)
    todo = planner.plan_store(chain, 0, tail=False, holds=lambda _g, _s: True)
    skipped = {found.key for _, records in todo.skipped for found in records}
    assert skipped == {found.key for found in match.path()} & seen  # a store believes what was seen
    planner.gathered(todo, None)
    planner.leases.clear()
    check_accounts(planner, idle=True)
    assert len(planner.directory) == 40 - len(presumed)
    assert not any(found.presumed for found in match.path())


def test_a_tier_that_denies_an_object_is_presumed_to_hold_it_no_more() -> None:
    planner, chain = make_planner(tiers=3), chain_of(CHUNK * 20)
    tiers = Tiers(planner, [key(chain, span) for span in chain.spans(20)], ())
    assert tiers.look(chain).tokens == CHUNK * 20
    planner.absent([key(chain, chain.span(5))], 1, 0.0)
    assert planner.match(chain).tokens == CHUNK * 5


def test_a_hit_whose_lease_ran_out_presumes_anew() -> None:
    planner, chain = make_planner(tiers=3), chain_of(CHUNK * 20)
    tiers = Tiers(planner, [key(chain, span) for span in chain.spans(20)], ())
    match = tiers.look(chain)
    (lease,) = planner.leases._leases.values()
    planner.release(lease.number)
    assert planner.match(chain).tokens < match.tokens
    again = planner.claim(match, lease)
    assert again.tokens == match.tokens
    planner.unpin(again.path())
    check_accounts(planner, idle=True)


def usable(chain: ChunkChain, layout: KVLayout, there: set[ObjectKey], *, whole: bool) -> int:
    """By brute force: the end of the longest hit. ``whole``: up to a chunk's end only."""
    parts = [FULL, WINDOW, STATE][: len(layout.groups)]
    reached = [0]
    leading = 0
    while leading < len(chain) and key(chain, chain.span(leading)) in there:
        leading += 1
    for count in range(leading + 1):
        spans = [chain.span(i) for i in range(count)]
        has_tails = count == leading and not whole  # elsewhere a whole chunk stands there
        ends = [spans] + [[*spans, tail] for tail in chain.tails(count) if has_tails]
        for path in ends:
            stop = path[-1].stop if path else 0
            firsts = [_first(held.group, stop) for held in layout.groups]
            if all(
                key(chain, span, part) in there
                for part, first in zip(parts, firsts, strict=True)
                for span in path
                if span.stop > first
            ):
                reached.append(stop)
    return max(reached)


def _first(group: KVGroup, stop: int) -> int:
    """The first token that a hit of ``stop`` tokens needs of a group."""
    window = group.window_tokens or 0
    match group.hit_rule:
        case HitRule.EVERY_CHUNK:
            return 0
        case HitRule.TRAILING:
            return max(0, stop - window)
        case HitRule.CHUNKED:
            return stop // window * window
        case HitRule.BOUNDARY:
            return max(0, stop - 1)


LAYOUTS = [plain_layout(), hybrid_layout(20), hybrid_layout(70), chunked_layout(48)]


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_prompt_without_holes_is_found_as_if_every_chunk_had_been_asked_about(
    data: st.DataObject,
) -> None:
    layout = data.draw(st.sampled_from(LAYOUTS))
    chain = chain_of(data.draw(st.integers(0, CHUNK * 70)))
    parts = [FULL, WINDOW, STATE][: len(layout.groups)]
    stops = [data.draw(st.integers(0, len(chain))) for _ in range(2)]
    held: list[set[ObjectKey]] = []
    for stop in stops:
        spans = chain.spans(stop)
        tails = data.draw(st.sets(st.sampled_from(chain.tails(stop)))) if chain.tails(stop) else ()
        held.append({key(chain, span, FULL) for span in [*spans, *tails]})
        for part in parts[1:]:  # windows and states have holes: old ones go first
            kept = data.draw(st.sets(st.sampled_from([*spans, *tails]))) if spans or tails else ()
            held[-1] |= {key(chain, span, part) for span in kept}
    planner = make_planner(layout=layout, tiers=3, pages=512)
    known = data.draw(st.sets(st.sampled_from(sorted(held[0])))) if held[0] else set()
    planner.note(known, 1)
    tiers = Tiers(planner, *held)
    assert tiers.look(chain).tokens == usable(chain, layout, held[0] | held[1], whole=False)
    planner.leases.clear()
    check_accounts(planner, idle=True)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_whatever_holes_there_are_a_read_finds_them(data: st.DataObject) -> None:
    """Never more than there is, once what was presumed has been read; and each time it is found
    more exactly, until a lookup says what is there."""
    layout = plain_layout()
    chain = chain_of(data.draw(st.integers(CHUNK, CHUNK * 70)))
    there = data.draw(st.sets(st.sampled_from(chain.spans(len(chain)))))
    if data.draw(st.booleans()):  # nearly all of it, so that much is presumed
        there = set(chain.spans(len(chain))) - there
    held = {key(chain, span) for span in there}
    planner = make_planner(tiers=3, pages=512)
    tiers = Tiers(planner, held, ())
    right = usable(chain, layout, held, whole=True)
    for now in range(len(chain) + 2):
        match = tiers.look(chain, now * 2.0)
        assert match.tokens >= right
        missing = next((found for found in match.path() if found.key not in held), None)
        for found in match.path():
            if found is missing:
                planner.missing(found, 1, Cause.VANISHED, "")
                break
            planner.note([found.key], 1)  # a read has seen it
        planner.leases.clear()
        check_accounts(planner, idle=True)
        if missing is None:
            break
    assert match.tokens == right
    assert planner.match(chain).tokens == right


# -- with a backend --------------------------------------------------------------------------------


async def put(rig: Rig, chain: ChunkChain, spans: Iterable[Span]) -> None:
    """Other processes have stored these; nothing is known of them here."""
    todo = rig.planner.plan_store(chain, 0, tail=False, holds=lambda _g, _s: True)
    rig.write_into(todo.gathers)
    rig.planner.stored(todo.gathers, ok=True)
    await rig.stack.spills.start([(s.span, s.record) for s in todo.gathers], [])
    await rig.stack.spills.flush()
    rig.planner.settle(chain, todo.gathers)
    kept = {key(chain, span) for span in spans}
    rig.planner.evict([s.record for s in todo.gathers], Cause.CLEARED, "")
    rig.planner.vanished([s.record.key for s in todo.gathers], 1, "")
    for name in list(rig.backend.objects):
        if not any(str(name).startswith(k) for k in kept):
            del rig.backend.objects[name]
    rig.backend.calls.clear()


async def load(rig: Rig, chain: ChunkChain) -> tuple[int, int]:
    """Tokens that a lookup found, and tokens that were loaded of them; all bytes are right."""
    match, lease = await rig.stack.finder.lease(chain, owner="", seconds=1e9)
    rig.planner.pin(match.path())
    rig.stager.scattered.clear()
    rig.stager.bytes.clear()
    view = KVView.single([], range(chain.num_tokens))
    window = Window(0, chain.num_tokens)
    report = await rig.stack.retrieve(match, view, window, lease=None)
    rig.planner.unpin(match.path())
    rig.planner.release(lease.number)
    for (part, first, *_), payload in zip(rig.stager.scattered, rig.stager.bytes, strict=True):
        assert payload == pattern(first, part, len(payload))
    return match.tokens, report.tokens


@pytest.mark.asyncio
@pytest.mark.parametrize("hole", [0, 3, 7, 12, 15, 29, 31, 39])
async def test_a_hole_ends_what_is_loaded_and_the_next_lookup(hole: int) -> None:
    rig, chain = make_rig(shared=True, pages=128), chain_of(CHUNK * 40)
    await put(rig, chain, [s for i, s in enumerate(chain.spans(40)) if i != hole])
    found, loaded = await load(rig, chain)
    assert loaded == hole * CHUNK <= found
    again = await load(rig, chain)
    assert again == (loaded, loaded)
    check_accounts(rig.planner, idle=True)
    await rig.aclose()


@pytest.mark.asyncio
async def test_what_was_presumed_and_read_has_been_seen() -> None:
    rig, chain = make_rig(shared=True, pages=128), chain_of(CHUNK * 40)
    await put(rig, chain, chain.spans(40))
    assert await load(rig, chain) == (chain.num_tokens, chain.num_tokens)
    rig.planner.evict(list(rig.planner.directory.objects()), Cause.CLEARED, "")
    asked = rig.backend.count("contains")
    assert await load(rig, chain) == (chain.num_tokens, chain.num_tokens)
    assert rig.backend.count("contains") == asked
    await rig.aclose()


@pytest.mark.asyncio
async def test_a_key_that_cannot_be_looked_at_ends_the_hit_and_is_asked_about_again() -> None:
    rig, chain = make_rig(shared=True, pages=128), chain_of(CHUNK * 40)
    await put(rig, chain, chain.spans(40))
    real, bad = rig.backend.contains, {8}

    async def contains(keys: Sequence[ObjectKey], /) -> list[SizeResult]:
        sizes: list[SizeResult] = [*await real(keys)]
        for at, asked in enumerate(keys):
            if any(str(asked).startswith(key(chain, chain.span(i))) for i in bad):
                sizes[at] = BackendError("unreadable")
        return sizes

    rig.backend.contains = contains  # type: ignore[method-assign]
    bad |= {31, 39}  # ends of windows
    found, loaded = await load(rig, chain)
    assert CHUNK * 16 <= loaded == found < CHUNK * 32
    bad.clear()
    assert await load(rig, chain) == (chain.num_tokens, chain.num_tokens)
    await rig.aclose()


@pytest.mark.asyncio
async def test_two_lookups_at_once_ask_once_and_one_may_leave() -> None:
    rig, chain = make_rig(shared=True, pages=128), chain_of(CHUNK * 40)
    await put(rig, chain, chain.spans(40))
    rig.backend.gate = asyncio.Event()
    looks = [
        asyncio.ensure_future(rig.stack.finder.lease(chain, owner="", seconds=1e9))
        for _ in range(3)
    ]
    await rig.backend.arrived.wait()
    looks[0].cancel()
    await asyncio.wait({looks[0]})
    rig.backend.gate.set()
    for look in looks[1:]:
        assert (await look)[0].tokens == chain.num_tokens
    asked = [k for name, k in rig.backend.calls if name == "contains"]
    assert len(set(asked)) == len(asked)
    tier = rig.tier.stats(0, 0, None)
    assert (tier.asked_keys, tier.questions) == (len(asked), 1)
    await rig.aclose()


@pytest.mark.asyncio
async def test_a_question_that_everybody_has_left_is_cancelled_and_asked_anew() -> None:
    rig, chain = make_rig(shared=True, pages=128), chain_of(CHUNK * 4)
    await put(rig, chain, chain.spans(4))
    rig.backend.gate = asyncio.Event()
    look = asyncio.ensure_future(rig.stack.finder.find(chain))
    await rig.backend.arrived.wait()
    look.cancel()
    await asyncio.wait({look})
    await rig.settled()
    rig.backend.gate.set()
    assert (await rig.stack.finder.find(chain)).tokens == chain.num_tokens
    assert rig.tier.health().ok
    await rig.aclose()


@in_virtual_time
async def test_a_tier_that_answers_too_late_costs_one_deadline_for_all_who_wait() -> None:
    rig, chain = make_rig(shared=True, pages=128, deadline=2.0), chain_of(CHUNK * 40)
    await put(rig, chain, chain.spans(40))
    rig.backend.gate = asyncio.Event()
    looks = [rig.stack.finder.find(chain) for _ in range(3)]
    assert [match.tokens for match in await asyncio.gather(*looks)] == [0, 0, 0]
    assert rig.tier.misses[Cause.DEADLINE] == 1
    assert not rig.tier.guard.serves
    await rig.aclose()


@in_virtual_time
async def test_an_answer_that_comes_after_the_deadline_says_nothing_good_of_a_tier(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rig, chain = make_rig(shared=True, pages=128, deadline=2.0), chain_of(CHUNK * 40)
    await put(rig, chain, chain.spans(40))
    rig.backend.gate, contains = asyncio.Event(), rig.backend.contains

    async def answers_whatever_it_is_told(keys: Sequence[ObjectKey]) -> list[SizeResult]:
        task = asyncio.ensure_future(contains(keys))
        while not task.done():
            with suppress(asyncio.CancelledError):
                await asyncio.wait({task})
        return task.result()

    monkeypatch.setattr(rig.backend, "contains", answers_whatever_it_is_told)
    assert (await rig.stack.finder.find(chain)).tokens == 0
    rig.backend.gate.set()
    await rig.settled()
    assert not rig.tier.guard.inflight
    assert not rig.tier.guard.serves
    await rig.aclose()


@pytest.mark.asyncio
async def test_an_absence_is_believed_for_a_second_and_no_longer() -> None:
    rig, chain = make_rig(shared=True, pages=128), chain_of(CHUNK * 40)
    await put(rig, chain, ())
    assert (await rig.stack.finder.find(chain)).tokens == 0
    asked = rig.backend.count("contains")
    assert (await rig.stack.finder.find(chain)).tokens == 0
    assert rig.backend.count("contains") == asked
    leased = rig.stack.finder.lease_at_once(chain, owner="", seconds=1e9)
    assert leased is not None and leased[0].tokens == 0  # nobody has to be asked
    rig.clock.now += 1.0
    assert rig.stack.finder.lease_at_once(chain, owner="", seconds=1e9) is None
    assert (await rig.stack.finder.find(chain)).tokens == 0
    assert rig.backend.count("contains") == 2 * asked
    await rig.aclose()


@pytest.mark.asyncio
async def test_what_is_written_within_that_second_is_found() -> None:
    rig, chain = make_rig(shared=True, pages=128), chain_of(CHUNK * 40)
    await put(rig, chain, ())
    assert (await rig.stack.finder.find(chain)).tokens == 0
    await rig.send_down(chain)
    found, loaded = await load(rig, chain)
    assert found == loaded == chain.num_tokens
    heard = [record.key for record in rig.planner.directory.objects()]
    rig.planner.evict(list(rig.planner.directory.objects()), Cause.CLEARED, "")
    rig.planner.vanished(heard, 1, "")
    rig.planner.absent(heard, 1, rig.clock.now)
    rig.planner.note(heard, 1)  # the backend says that others have stored it
    rig.planner.vanished(heard, 1, "")
    asked = rig.backend.count("contains")
    assert (await rig.stack.finder.find(chain)).tokens == chain.num_tokens
    assert rig.backend.count("contains") > asked
    await rig.aclose()


@pytest.mark.asyncio
async def test_a_chunk_that_is_being_stored_is_not_presumed() -> None:
    rig, chain = make_rig(shared=True, pages=128), chain_of(CHUNK * 20)
    await put(rig, chain, chain.spans(20))
    todo = rig.planner.plan_store(chain.until(CHUNK * 2), 0, tail=False, holds=lambda _g, _s: True)
    match, lease = await rig.stack.finder.lease(chain, owner="", seconds=1e9)
    assert match.tokens == CHUNK  # it was asked about the first; the second is being filled
    assert todo.gathers[1].record.host is HostState.FILLING
    rig.planner.release(lease.number)
    rig.planner.gathered(todo, None)
    await rig.aclose()
