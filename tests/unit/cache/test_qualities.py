"""Two qualities and two epochs in one cache: nothing of one is ever served as another."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from caches import WEIGHTS, config, group, layout, tokens
from engine import Engine, same
from stacks import check_accounts

from kvlayer import Cache, Namespace, Portal, Scope
from kvlayer.errors import ArgumentError, IdentityError
from kvlayer.events import Event, LookupDone
from kvlayer.identity.quality import EXACT

LENGTH = 72
PROMPT = tokens(LENGTH)
QUALITIES = ("int4-1", "fp8-1")
FIRST = Namespace(weights=WEIGHTS, groups=(group(),), compute_dtype="bfloat16", tokens_per_chunk=16)
SECOND = replace(FIRST, weights="sha256:" + "cd" * 32)
BOTH = Scope(accepts=QUALITIES)


class Kinds:
    """What each set of weights computes of the prompt, exactly and in each quality."""

    def __init__(self) -> None:
        kinds = [(ns.digest, q) for ns in (FIRST, SECOND) for q in (EXACT, *QUALITIES)]
        self.engines = {kind: Engine(layout(), 32, seed) for seed, kind in enumerate(kinds)}
        self.slots = self.engines[kinds[0]].slots(LENGTH)

    def view(self, namespace: Namespace, quality: str, stop: int = LENGTH, start: int = 0) -> Any:
        return self.engines[namespace.digest, quality].view(self.slots[start:stop])

    def right(self, namespace: Namespace, quality: str, start: int, stop: int) -> Any:
        engine = self.engines[namespace.digest, quality]
        return [plane[start:stop] for plane in engine.read(self.slots)]


async def look(cache: Cache, kinds: Kinds, namespace: Namespace, prompt: Any, scope: Scope) -> Any:
    """Look a prompt up and compare every byte with what the hit says it is."""
    other = Engine(layout(), 32, 99)
    slots = other.slots(LENGTH, seed=3)
    async with cache.lookup(prompt, scope=scope) as hit:
        assert hit.quality == EXACT or hit.quality in scope.accepts
        assert (hit.exact_tokens < hit.tokens) == (hit.quality != EXACT)
        report = await cache.retrieve(hit, other.view(slots))
        assert (report.tokens, report.failed) == (hit.tokens, ())
    found = other.read(slots)
    exact = hit.exact_tokens
    assert same([p[:exact] for p in found], kinds.right(namespace, EXACT, 0, exact))
    assert same(
        [p[exact : hit.tokens] for p in found],
        kinds.right(namespace, hit.quality, exact, hit.tokens),
    )
    return hit


@pytest.mark.asyncio
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("host", ["1MiB", "64KiB"])
async def test_two_qualities_and_two_epochs_never_mix(tmp_path: Path, seed: int, host: str) -> None:
    rng, kinds, now = random.Random(seed), Kinds(), FIRST
    said: set[tuple[str, bool]] = set()
    async with Cache.open(config(tmp_path, host=host, write="back"), layout(), FIRST) as cache:
        for _ in range(60):
            match rng.randrange(8):
                case 0 | 1 | 2:
                    quality = rng.choice([EXACT, *QUALITIES])
                    first, stop = rng.choice([0, 0, 16, 32]), rng.choice([32, 48, 64, LENGTH])
                    if first < stop:
                        view = kinds.view(now, quality, stop, first)
                        report = await cache.store(
                            PROMPT[:stop], view, first_token=first, quality=quality
                        )
                        assert report.failed == ()
                case 3:
                    now = rng.choice([FIRST, SECOND])
                    await cache.rebind(now)
                case 4:
                    await cache.flush()
                    if rng.random() < 0.3:
                        await cache.control.evict(PROMPT)
                    else:
                        await cache.control.clear("cpu")
                case _:
                    scope = Scope(accepts=tuple(rng.sample(QUALITIES, rng.randrange(3))))
                    stop = rng.choice([48, LENGTH])
                    hit = await look(cache, kinds, now, PROMPT[:stop], scope)
                    said.add((hit.quality, hit.exact_tokens > 0))
                    old = rng.choice([FIRST, SECOND])
                    chain = cache.chain(PROMPT[:stop], scope, namespace=old)
                    await look(cache, kinds, old, chain, scope)
        await cache.flush()
        check_accounts(cache.stack.planner, idle=True)
    assert {quality for quality, _ in said} >= {EXACT, QUALITIES[seed % 2]} or len(said) > 2


@pytest.mark.asyncio
async def test_what_is_computed_after_an_approximation_is_stored_as_one(tmp_path: Path) -> None:
    kinds, heard = Kinds(), list[Event]()
    async with Cache.open(config(tmp_path), layout(), FIRST, sinks=[heard.append]) as cache:
        await cache.store(PROMPT[:32], kinds.view(FIRST, EXACT, 32))
        await cache.store(
            PROMPT[:48], kinds.view(FIRST, "fp8-1", 48, 32), first_token=32, quality="fp8-1"
        )
        hit = await look(cache, kinds, FIRST, PROMPT, BOTH)
        assert (hit.tokens, hit.exact_tokens, hit.quality) == (48, 32, "fp8-1")
        report = await cache.store(
            PROMPT, kinds.view(FIRST, hit.quality), quality=hit.quality
        )  # the whole prompt: what is exact is not stored a second time
        assert (report.stored, report.skipped) == (2, 3)
        assert (await look(cache, kinds, FIRST, PROMPT, Scope())).tokens == 32
        assert (await look(cache, kinds, FIRST, PROMPT, BOTH)).tokens == LENGTH
        await cache.prefetch(PROMPT, scope=BOTH)
        assert (await cache.control.explain(PROMPT, scope=BOTH)).hit_tokens == LENGTH
        assert (await cache.control.explain(PROMPT)).hit_tokens == 32
        pin = await cache.control.pin(PROMPT, scope=BOTH, seconds=10.0)
        assert pin.tokens == LENGTH and cache.control.unpin(pin)
    looked = [event for event in heard if isinstance(event, LookupDone)]
    assert [event.quality for event in looked] == ["fp8-1", EXACT, "fp8-1"]
    async with Cache.open(config(tmp_path), layout(), FIRST) as cache:  # another process
        assert (await look(cache, kinds, FIRST, PROMPT, Scope())).tokens == 32
        hit = await look(cache, kinds, FIRST, PROMPT, BOTH)
        assert (hit.tokens, hit.exact_tokens, hit.quality) == (LENGTH, 32, "fp8-1")


def test_a_portal_says_the_quality_in_the_callers_thread() -> None:
    kinds = Kinds()

    async def store(cache: Cache) -> None:
        await cache.store(PROMPT[:16], kinds.view(FIRST, EXACT, 16))
        await cache.store(PROMPT, kinds.view(FIRST, "int4-1"), quality="int4-1")

    with Portal.open(config(), layout(), FIRST) as portal:
        portal.call(store)
        with portal.lookup(PROMPT, scope=BOTH) as lookup:
            assert (lookup.hit.quality, lookup.hit.exact_tokens) == ("int4-1", 16)
            with portal.renew(lookup) as again:
                assert again.hit == lookup.hit
        with portal.lookup(PROMPT) as lookup:
            assert (lookup.hit.quality, lookup.hit.tokens) == (EXACT, 16)


@pytest.mark.asyncio
async def test_a_rebound_cache_accepts_qualities_of_its_new_weights_only() -> None:
    kinds = Kinds()
    async with Cache.open(config(), layout(), FIRST) as cache:
        await cache.store(PROMPT, kinds.view(FIRST, "fp8-1"), quality="fp8-1")
        kept = cache.chain(PROMPT, BOTH)
        await cache.rebind(SECOND)
        assert (await look(cache, kinds, SECOND, PROMPT, BOTH)).tokens == 0
        assert (await look(cache, kinds, SECOND, cache.chain(kept), BOTH)).tokens == 0
        old = cache.chain(PROMPT, BOTH, namespace=FIRST)
        hit = await look(cache, kinds, FIRST, old, BOTH)
        assert (hit.quality, hit.exact_tokens, hit.tokens) == ("fp8-1", 0, LENGTH)


@pytest.mark.asyncio
async def test_what_would_mix_two_approximations_or_names_none_is_refused() -> None:
    coarse = replace(FIRST, quality="int4-1")
    kinds = Kinds()
    async with Cache.open(config(), layout(), coarse) as cache:
        for refused in (
            cache.store(PROMPT, kinds.view(FIRST, "fp8-1"), quality="fp8-1"),
            cache.lookup(PROMPT, scope=BOTH).__aenter__(),
        ):
            with pytest.raises(IdentityError, match="cannot be mixed"):
                await refused
        own = Scope(accepts=("int4-1",))
        await cache.store(PROMPT, kinds.view(FIRST, "int4-1"), quality="int4-1")
        async with cache.lookup(PROMPT, scope=own) as hit:
            assert (hit.tokens, hit.quality, hit.exact_tokens) == (LENGTH, "int4-1", 0)
    async with Cache.open(config(), layout(), FIRST) as cache:
        with pytest.raises(IdentityError, match="quality cannot be"):
            cache.chain(PROMPT, Scope(accepts=("No Name",)))
        with pytest.raises(IdentityError, match="quality cannot be"):
            await cache.store(PROMPT, kinds.view(FIRST, EXACT), quality="")
        chain = cache.chain(PROMPT)
        with pytest.raises(IdentityError, match="does not"):
            await look(cache, kinds, FIRST, chain, BOTH)
        narrow = cache.chain(PROMPT, BOTH)
        await cache.store(PROMPT, kinds.view(FIRST, "fp8-1"), quality="fp8-1")
        assert (await look(cache, kinds, FIRST, narrow, Scope(owner="me"))).tokens == 0
    with pytest.raises((IdentityError, ArgumentError)):
        Scope(accepts=(3,))  # type: ignore[arg-type]
    assert Scope(accepts=("a", "exact", "a")).accepts == ("a",)


def test_accepting_more_names_nothing_else() -> None:
    """Whoever accepts an approximation shares all exact KV with whoever does not."""
    assert Scope(accepts=QUALITIES).extras() == Scope().extras()
