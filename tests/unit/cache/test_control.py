"""The control API: pins, evictions, counters and explanations."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from pathlib import Path

import pytest
from caches import WEIGHTS, config, group, layout, tokens
from engine import Engine

from kvlayer import Cache, Cause, Explanation, KVLayout, Salt, Scope
from kvlayer.errors import ConfigError
from kvlayer.events import Event, LookupDone, ObjectsEvicted, RetrieveDone, StoreDone
from kvlayer.identity.keys import ObjectKey
from kvlayer.layout import NHD
from kvlayer.results import MissedChunk
from kvlayer.tier.planner.records import ObjectRecord

PAGE = "16KiB"  # four objects of the test layout, which take a page each


async def _store(cache: Cache, seed: int, length: int = 32, scope: Scope | None = None) -> None:
    engine = Engine(layout(), 32)
    view = engine.view(engine.slots(length))
    await cache.store(tokens(length, seed), view, scope=scope or Scope())


async def _found(cache: Cache, seed: int) -> int:
    async with cache.lookup(tokens(32, seed)) as hit:
        return hit.tokens


@pytest.mark.asyncio
async def test_a_pinned_prefix_outlives_everything_else() -> None:
    async with Cache.open(config(host=PAGE), layout()) as cache:
        await _store(cache, 0)
        pin = await cache.control.pin(tokens(32), seconds=60)
        assert pin.tokens == 32
        for seed in range(1, 9):
            await _store(cache, seed)
        assert await _found(cache, 0) == 32
        assert cache.control.unpin(pin)
        assert not cache.control.unpin(pin)
        for seed in range(1, 9):
            await _store(cache, seed)
        assert await _found(cache, 0) == 0


@pytest.mark.asyncio
async def test_when_all_is_pinned_a_store_is_dropped_and_counted() -> None:
    async with Cache.open(config(host=PAGE), layout()) as cache:
        await _store(cache, 0, 64)
        pin = await cache.control.pin(tokens(64), seconds=60)
        engine = Engine(layout(), 32)
        report = await cache.store(tokens(32, 1), engine.view(engine.slots(32)))
        assert (report.stored, report.dropped) == (0, 2)
        assert cache.control.stats().tiers[0].misses == {Cause.NO_ROOM: 2}
        cache.control.unpin(pin)


@pytest.mark.asyncio
async def test_a_pin_ends_at_its_deadline_even_if_its_owner_died() -> None:
    async with Cache.open(config(host=PAGE), layout()) as cache:
        await _store(cache, 0, 64)
        await cache.control.pin(tokens(64), seconds=0.0, owner="died")
        await _store(cache, 1)
        assert await _found(cache, 1) == 32


@pytest.mark.asyncio
async def test_a_hit_whose_lease_ran_out_says_what_it_lost() -> None:
    engine = Engine(layout(), 32)
    async with Cache.open(config(host=PAGE, lease_seconds=1e-9), layout()) as cache:
        await _store(cache, 0, 64)
        async with cache.lookup(tokens(64)) as hit:
            await _store(cache, 1)
            report = await cache.retrieve(hit, engine.view(engine.slots(64)))
        assert (hit.tokens, report.tokens) == (64, 32)
        assert [(f.span.start, f.cause) for f in report.failed] == [(32, Cause.VANISHED)]


@pytest.mark.asyncio
async def test_prefix_lru_gives_up_a_prompts_end_before_its_start() -> None:
    async with Cache.open(config(host=PAGE), layout()) as cache:
        await _store(cache, 0, 64)
        await _store(cache, 1)
        async with cache.lookup(tokens(64)) as hit:
            assert hit.tokens == 32


@pytest.mark.asyncio
async def test_clear_empties_a_tier_or_all(tmp_path: Path) -> None:
    async with Cache.open(config(tmp_path), layout()) as cache:
        await _store(cache, 0)
        assert await cache.control.clear("cpu") == 2
        assert await _found(cache, 0) == 32  # the disk still has it
        assert await cache.control.clear() == 2
        assert await _found(cache, 0) == 0
        (miss,) = (await cache.control.explain(tokens(32))).misses
        assert miss.cause is Cause.CLEARED


@pytest.mark.asyncio
async def test_evict_removes_one_prompt_from_one_tier(tmp_path: Path) -> None:
    async with Cache.open(config(tmp_path), layout()) as cache:
        await _store(cache, 0)
        await _store(cache, 1)
        assert await cache.control.evict(tokens(32), tier="file") == 2
        assert await cache.control.evict(tokens(32), tier="cpu") == 2
        assert (await _found(cache, 0), await _found(cache, 1)) == (0, 32)
        with pytest.raises(ConfigError, match="no tier 'flie'") as caught:
            await cache.control.evict(tokens(32), tier="flie")
        assert caught.value.hint == "did you mean 'file'?"


@pytest.mark.asyncio
async def test_evict_removes_what_another_process_stored(tmp_path: Path) -> None:
    async with Cache.open(config(tmp_path), layout()) as cache:
        await cache.recovered()
        async with Cache.open(config(tmp_path), layout()) as other:
            await _store(other, 0)
        assert await cache.control.evict(tokens(32), tier="file") == 2
        assert await _found(cache, 0) == 0


@pytest.mark.asyncio
async def test_every_operation_tells_who_asked_and_what_came_of_it() -> None:
    events: list[Event] = []
    scope = Scope(owner="request-7")
    engine = Engine(layout(), 32)
    view = engine.view(engine.slots(32))
    async with Cache.open(config(), layout(), sinks=[events.append]) as cache:
        await cache.store(tokens(32), view, scope=scope)
        async with cache.lookup(tokens(40), scope=scope) as hit:
            await cache.retrieve(hit, view)
    done = [e for e in events if isinstance(e, (StoreDone, LookupDone, RetrieveDone))]
    assert [e.owner for e in done] == ["request-7"] * 3
    stored, looked, loaded = done
    assert isinstance(stored, StoreDone) and (stored.stored, stored.nbytes) == (2, 8192)
    assert isinstance(looked, LookupDone) and (looked.asked_tokens, looked.hit_tokens) == (40, 32)
    assert isinstance(loaded, RetrieveDone) and (loaded.asked_tokens, loaded.tokens) == (32, 32)


@pytest.mark.asyncio
async def test_a_sink_that_raises_never_reaches_the_caller(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def broken(event: Event) -> None:
        raise RuntimeError("sink")

    async with Cache.open(config(), layout(), sinks=[broken]) as cache:
        await _store(cache, 0)
        assert await _found(cache, 0) == 32
    assert caplog.text.count("sink raised RuntimeError: sink") == 1


async def _causes(cache: Cache, prompt: object, scope: Scope | None = None) -> list[MissedChunk]:
    return list((await cache.control.explain(prompt, scope=scope or Scope())).misses)


@pytest.mark.asyncio
async def test_explain_names_what_was_never_stored_and_where_it_parts() -> None:
    async with Cache.open(config(), layout()) as cache:
        await _store(cache, 0, 64)
        other = array("i", tokens(64))
        other[21] += 1
        (miss,) = await _causes(cache, other)
        assert (miss.cause, miss.start, miss.stop) == (Cause.NEVER_STORED, 16, 64)
        assert miss.divergent_token == 21
        (miss,) = await _causes(cache, tokens(64, seed=5))
        assert (miss.cause, miss.divergent_token) == (Cause.NEVER_STORED, 0)


@pytest.mark.asyncio
async def test_explain_names_the_policy_that_evicted() -> None:
    events: list[Event] = []
    async with Cache.open(config(host=PAGE), layout(), sinks=[events.append]) as cache:
        await _store(cache, 0, 64)
        await _store(cache, 1, 64)
        (miss,) = await _causes(cache, tokens(64))
        assert miss.cause is Cause.EVICTED
        assert "from cpu by prefix-lru, 0 s ago" in miss.detail
        assert cache.control.stats().tiers[0].evicted == 4
    assert sum(len(e.keys) for e in events if isinstance(e, ObjectsEvicted)) == 4


@pytest.mark.asyncio
async def test_explain_names_the_scope_under_which_its_owner_stored_the_tokens() -> None:
    async with Cache.open(config(), layout()) as cache:
        outer = Salt("secret-tenant")
        await _store(cache, 0, scope=Scope(salts=(outer,)))
        inner = Scope(salts=(outer, Salt("session", 1)))
        (miss,) = await _causes(cache, tokens(32), inner)
        assert miss.cause is Cause.OTHER_SALT
        assert "salt of zone" in miss.detail
        assert "secret-tenant" not in miss.detail
        await _store(cache, 1)
        (miss,) = await _causes(cache, tokens(32, 1), Scope.private("secret-tenant"))
        assert miss.cause is Cause.OTHER_SALT


ASKERS = {
    "nobody": Scope(),
    "another owner": Scope(owner="bob"),
    "another tenant": Scope.private("b"),
    "another tenant and owner": Scope.private("b", owner="bob"),
    "the same tenant's other user": Scope.private("a", owner="bob"),
    "who shares a beginning": Scope.private("b", first_token=16, owner="bob"),
}


@pytest.mark.parametrize("tier", ["host", "disk"])
@pytest.mark.parametrize("asker", ASKERS)
@pytest.mark.asyncio
async def test_explain_says_nothing_of_what_others_have_stored(
    tmp_path: Path, asker: str, tier: str
) -> None:
    """As if it had never been there: stored, diverging, lost, evicted, on its way."""
    scope, prompts = ASKERS[asker], [tokens(64), tokens(33, 1), tokens(16, 2)]
    diverging = array("i", tokens(64))
    diverging[21] += 1
    asked = [*prompts, diverging, tokens(64, 3)]
    folder = None if tier == "host" else tmp_path
    answers: list[list[Explanation]] = []
    for is_inhabited in (False, True):
        async with Cache.open(config(folder, host=PAGE), layout()) as cache:
            await _store(cache, 9, 32, scope=scope)  # the asker's own
            for seed, length in ((0, 64), (1, 33), (2, 16)) if is_inhabited else ():
                alice = Scope.private("a", owner="alice")
                await _store(cache, seed, length, scope=alice)
                assert await _causes(cache, array("i", tokens(length, seed))[:8], alice)
            await cache.control.clear()  # a public hit is found by a lookup, too: none is left
            await _store(cache, 9, 32, scope=scope)
            answers.append([await cache.control.explain(p, scope=scope) for p in asked])
    assert answers[0] == answers[1]


@pytest.mark.asyncio
async def test_a_public_prompt_of_another_owner_is_no_oracle() -> None:
    """Its first tokens could be guessed one by one, if explain said where a guess parts from it."""
    async with Cache.open(config(), layout()) as cache:
        await _store(cache, 0, 32, scope=Scope(owner="alice"))
        guess = array("i", tokens(32))
        guess[5] += 1
        (theirs,) = await _causes(cache, guess, Scope(owner="bob"))
        (unheard,) = await _causes(cache, tokens(32, 7), Scope(owner="bob"))
        assert (theirs.cause, theirs.detail) == (unheard.cause, unheard.detail)
        assert theirs.divergent_token is None
        (own,) = await _causes(cache, guess, Scope(owner="alice"))
        assert own.divergent_token == 5


@pytest.mark.asyncio
async def test_what_others_store_changes_no_answer_to_the_owner() -> None:
    async with Cache.open(config(), layout()) as cache:
        guess = array("i", tokens(32))
        guess[5] += 1
        alice = Scope(owner="alice")
        await _store(cache, 0, 32, scope=alice)
        before = await _causes(cache, guess, alice)
        for scope in (Scope(owner="bob"), Scope(), Scope.private("s")):
            await _store(cache, 7, 32, scope=scope)
            await _store(cache, 0, 32, scope=scope)
        assert await _causes(cache, guess, alice) == before


@pytest.mark.asyncio
async def test_who_stores_what_is_there_already_is_told_of_its_loss() -> None:
    async with Cache.open(config(host=PAGE), layout()) as cache:
        for owner in ("alice", "bob"):
            await _store(cache, 0, 64, scope=Scope(owner=owner))
        await cache.control.clear()
        for owner, cause in (
            ("alice", Cause.CLEARED),
            ("bob", Cause.CLEARED),
            ("carol", Cause.NEVER_STORED),
            ("", Cause.NEVER_STORED),
        ):
            (miss,) = await _causes(cache, tokens(64), Scope(owner=owner))
            assert miss.cause is cause


@pytest.mark.asyncio
async def test_explain_names_the_field_in_which_another_namespace_differs(tmp_path: Path) -> None:
    other = KVLayout.single(group(), NHD, tokens_per_block=4)
    async with Cache.open(config(tmp_path, weights="sha256:" + "cd" * 32), other) as cache:
        engine = Engine(other, 32)
        await cache.store(tokens(32), engine.view(engine.slots(32)))
    async with Cache.open(config(tmp_path), layout()) as cache:
        (miss,) = await _causes(cache, tokens(32))
        assert miss.cause is Cause.OTHER_NAMESPACE
        assert "weights" in miss.detail and WEIGHTS in miss.detail


@pytest.mark.asyncio
async def test_explain_names_tokens_too_few_for_a_tail() -> None:
    async with Cache.open(config(), layout()) as cache:
        await _store(cache, 0, 33)
        (miss,) = await _causes(cache, tokens(33))
        assert (miss.cause, miss.start, miss.stop) == (Cause.SHORT, 32, 33)


@pytest.mark.asyncio
async def test_explain_of_a_full_hit_has_no_misses(tmp_path: Path) -> None:
    async with Cache.open(config(tmp_path), layout()) as cache:
        await _store(cache, 0)
        explained = await cache.control.explain(tokens(32))
        assert (explained.hit_tokens, explained.misses) == (32, ())
        assert str(explained) == "32 of 32 tokens usable (32 from cpu)"
        await cache.control.evict(tokens(32), tier="cpu")
        assert str(await cache.control.explain(tokens(32))).endswith("(32 from file)")


@pytest.mark.asyncio
async def test_clearing_much_lets_lookups_of_other_threads_in_between(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, prompt = Engine(layout(), 64), tokens(16 * 600)
    async with Cache.open(config(tmp_path, host="4MiB", write="back"), layout()) as cache:
        slots = array("q", (i % 256 for i in range(len(prompt))))
        await cache.store(prompt, engine.view(slots))
        planner, sizes = cache.stack.planner, list[int]()
        evict = planner.evict

        def counted(records: Sequence[ObjectRecord], cause: Cause, detail: str) -> list[ObjectKey]:
            sizes.append(len(records))
            return evict(records, cause, detail)

        monkeypatch.setattr(planner, "evict", counted)
        await cache.flush()
        assert await cache.control.clear("cpu") == 600
        assert sum(sizes) == 600 and max(sizes) <= 256
        assert len(planner.host) == 0
        async with cache.lookup(prompt) as hit:
            assert hit.tokens == len(prompt)  # the disk still has it
        assert await cache.control.clear() == 600
        assert len(planner.directory) == 0
