"""Chains that callers keep, and spans that other prompts cut: through the public API."""

from __future__ import annotations

import asyncio
from array import array
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from caches import config, layout, tokens
from engine import Engine, same

from kvlayer import Cache, Cause, Scope
from kvlayer.errors import IdentityError, LayoutError
from kvlayer.identity.chain import ChunkChain, Span
from kvlayer.identity.tokens import token_bytes

TAIL = 2


class Cut(ChunkChain):
    """A prompt whose second chunk is what follows a cut at token 24."""

    def span(self, index: int) -> Span:
        whole = super().span(index)
        return whole if index != 1 else Span(24, whole.stop, whole.hash)

    def spans(self, stop: int, start: int = 0) -> list[Span]:
        return [self.span(index) for index in range(start, stop)]


async def _load(cache: Cache, engine: Engine, prompt: Any, slots: Any) -> int:
    other = Engine(layout(), 32, seed=5)
    async with cache.lookup(prompt) as hit:
        report = await cache.retrieve(hit, other.view(slots))
    assert report.failed == ()
    there = slots[: report.tokens]
    assert same(engine.read(there), other.read(there))
    return report.tokens


@pytest.mark.asyncio
async def test_a_beginning_that_ends_inside_a_chunk_is_shared_and_gone_on_from(
    tmp_path: Path,
) -> None:
    """One object up to the cut, one from there to the chunk's end, then whole chunks."""
    engine, prompt = Engine(layout(), 32), tokens(64)
    slots = engine.slots(64)
    async with Cache.open(config(tmp_path), layout()) as cache:
        await cache.store(prompt[:24], engine.view(slots[:24]))
        sizes = cache.namespace.tokens_per_chunk, cache.namespace.tokens_per_tail
        chain = Cut(prompt, Scope(), tokens_per_chunk=sizes[0], tokens_per_tail=sizes[1])
        report = await cache.store(chain, engine.view(slots[16:]), first_token=16)
        assert (report.stored, report.failed) == (3, ())
        assert await _load(cache, engine, prompt, slots) == 64
        async with cache.lookup(prompt) as hit:
            assert [span.tokens for span in hit.spans] == [16, 8, 8, 16, 16]
        await cache.control.evict(prompt, tier="cpu")
    async with Cache.open(config(tmp_path), layout()) as cache:
        await cache.recovered()
        assert await _load(cache, engine, prompt, slots) == 64
        explained = await cache.control.explain(prompt)
        assert (explained.hit_tokens, explained.misses) == (64, ())


@pytest.mark.asyncio
async def test_a_chain_is_taken_wherever_tokens_are(tmp_path: Path) -> None:
    engine, prompt = Engine(layout(), 32), tokens(48)
    slots, scope = engine.slots(48), Scope.private("tenant", owner="me")
    async with Cache.open(config(tmp_path), layout()) as cache:
        chain = cache.chain(prompt[:32], scope)
        await cache.store(chain, engine.view(slots[:32]))
        longer = chain.grown(prompt[32:])
        report = await cache.store(longer, engine.view(slots[32:]), first_token=32)
        assert (report.stored, report.skipped) == (1, 0)
        for given in (longer, prompt):
            async with cache.lookup(given, scope=scope) as hit:
                assert (hit.tokens, hit.owner) == (48, "me")
        async with cache.lookup(longer) as hit:
            assert (hit.tokens, hit.owner) == (48, "me")
        async with cache.lookup(longer, scope=Scope.private("tenant", owner="you")) as hit:
            assert (hit.tokens, hit.owner) == (48, "you")
        async with cache.lookup(prompt) as hit:
            assert hit.tokens == 0
        assert (await cache.prefetch(longer)).tokens == 48
        pin = await cache.control.pin(longer, seconds=60)
        assert pin.tokens == 48
        cache.control.unpin(pin)
        with cache.begin_lookup(longer) as lookup:
            assert (await lookup).tokens == 48
        assert (await cache.control.explain(longer)).hit_tokens == 48
        assert await cache.control.evict(longer) == 3  # the prefetch holds those in host memory


@pytest.mark.asyncio
async def test_a_chain_of_another_scope_or_size_is_refused() -> None:
    async with Cache.open(config(), layout()) as cache:
        chain = cache.chain(tokens(32), Scope.private("a"))
        for scope in (Scope.private("b"), Scope.private("a", first_token=1), Scope(adapter=b"x")):
            with pytest.raises(IdentityError, match="salts"):
                cache.chain(chain, scope)
        public = cache.chain(tokens(32))
        with pytest.raises(IdentityError, match="salts"):
            async with cache.lookup(public, scope=Scope.private("a")):
                pass
        other = ChunkChain(tokens(32), Scope(), tokens_per_chunk=16, tokens_per_tail=4)
        with pytest.raises(IdentityError, match="16 and 4"):
            cache.chain(other)


@pytest.mark.asyncio
async def test_a_view_of_less_than_a_chain_stores_that_much_and_of_more_is_refused() -> None:
    engine = Engine(layout(), 32)
    slots = engine.slots(64)
    async with Cache.open(config(), layout()) as cache:
        chain = cache.chain(tokens(48))
        report = await cache.store(chain, engine.view(slots[:20]))
        assert report.stored == 2
        async with cache.lookup(chain) as hit:
            assert hit.tokens == 20
        with pytest.raises(LayoutError, match="48 tokens"):
            await cache.store(chain, engine.view(slots))


@pytest.mark.asyncio
async def test_what_an_engine_has_hashed_is_stored_and_found_by_its_tokens() -> None:
    """Links are SGLang's page hashes: who knows the tokens finds what was stored by hashes."""
    engine, prompt = Engine(layout(), 32), tokens(48)
    slots = engine.slots(48)
    async with Cache.open(config(), layout()) as cache:
        pages = cache.chain(prompt).links
        sizes = cache.namespace.tokens_per_chunk, cache.namespace.tokens_per_tail
        chain = ChunkChain.from_links(pages, tokens_per_chunk=sizes[0], tokens_per_tail=sizes[1])
        report = await cache.store(chain, engine.view(slots))
        assert report.stored == 3
        assert await _load(cache, engine, prompt, slots) == 48
        async with cache.lookup(chain) as hit:
            assert hit.tokens == 48


@pytest.mark.asyncio
async def test_an_id_that_is_never_named_ends_a_hit_and_a_store_and_is_explained() -> None:
    engine, prompt = Engine(layout(), 32), tokens(48)
    slots = engine.slots(48)
    async with Cache.open(config(), layout()) as cache:
        await cache.store(prompt, engine.view(slots))
        prompt[37] = 2**30
        async with cache.lookup(prompt) as hit:
            assert hit.tokens == 32
        *_, miss = (await cache.control.explain(prompt)).misses
        assert (miss.cause, miss.start, miss.stop) == (Cause.NO_NAME, 36, 48)
        prompt = prompt[:36]
        prompt[33] = 2**31 - 1
        *_, miss = (await cache.control.explain(prompt)).misses
        assert (miss.cause, miss.start, miss.stop) == (Cause.NO_NAME, 32, 36)
        assert "token 33" in miss.detail
        report = await cache.store(prompt, engine.view(slots[:36]))
        assert (report.stored, report.skipped) == (0, 2)
        (failure,) = report.failed
        assert (failure.cause, failure.span[:2]) == (Cause.NO_NAME, (32, 36))
        assert "token 33" in failure.detail
        await cache.store(prompt[:33], engine.view(slots[:33]))


@pytest.mark.asyncio
async def test_a_store_keeps_what_comes_before_an_id_that_is_never_named() -> None:
    engine, prompt = Engine(layout(), 32), tokens(48)
    slots = engine.slots(48)
    prompt[23] = 2**31 - 1
    async with Cache.open(config(), layout()) as cache:
        report = await cache.store(prompt, engine.view(slots))
        # Chunk 0, and a tail of three links behind it.
        assert (report.stored, [failure.span[:2] for failure in report.failed]) == (2, [(22, 48)])
        assert await _load(cache, engine, prompt, slots) == 22
        engine_view = engine.view(slots[16:])
        again = await cache.store(prompt, engine_view, first_token=16)
        assert (again.stored, again.skipped, len(again.failed)) == (0, 1, 1)
        beyond = await cache.store(prompt, engine.view(slots[32:]), first_token=32)
        assert (beyond.stored, beyond.skipped) == (0, 0)
        assert [failure.span[:2] for failure in beyond.failed] == [(32, 48)]


@pytest.mark.asyncio
@pytest.mark.parametrize(
    "scope", [Scope(), Scope.private("tenant"), Scope.private("t", first_token=16)]
)
async def test_a_prompt_is_packed_once_and_hashed_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scope: Scope
) -> None:
    """A salt costs one hash more, that of its fold, wherever it starts."""
    engine, prompt = Engine(layout(), 32), tokens(64)
    packed: list[int] = []
    hashed: list[bytes] = []

    def packing(given: Any) -> bytes:
        packed.append(len(given))
        return token_bytes(given)

    def hashing(data: bytes) -> Any:
        hashed.append(data)
        return sha256(data)

    async with Cache.open(config(tmp_path), layout()) as cache:
        monkeypatch.setattr("kvlayer.api.naming.token_bytes", packing)
        monkeypatch.setattr("kvlayer.identity.chain.token_bytes", packing)
        monkeypatch.setattr("kvlayer.identity.links.sha256", hashing)
        await cache.store(prompt, engine.view(engine.slots(64)), scope=scope)
        assert packed == [64]
        assert len(hashed) == 64 // cache.namespace.tokens_per_tail + len(scope.salts)


@pytest.mark.asyncio
@pytest.mark.parametrize("given_as", [list, partial(array, "I")])
async def test_a_long_prompt_is_packed_a_slice_at_a_time(
    monkeypatch: pytest.MonkeyPatch, given_as: Any
) -> None:
    monkeypatch.setattr("kvlayer.api.naming._STEP", 32)
    packed: list[int] = []

    def packing(given: Any) -> bytes:
        packed.append(len(given))
        return token_bytes(given)

    prompt, engine = given_as(tokens(320)), Engine(layout(), 128, 1)
    view = engine.view(engine.slots(320))
    async with Cache.open(config(), layout()) as cache:
        monkeypatch.setattr("kvlayer.api.naming.token_bytes", packing)
        monkeypatch.setattr("kvlayer.identity.chain.token_bytes", packing)

        async def prefetch() -> object:
            return await cache.prefetch(prompt)

        for call in (
            partial(cache.store, prompt, view),
            partial(cache.store, prompt, engine.view(engine.slots(300))),
            partial(cache.control.explain, prompt),
            prefetch,
            partial(cache.control.evict, prompt),
        ):
            await call()
            assert sum(packed) in (320, 300) and max(packed) <= 32
            packed.clear()
        async with cache.lookup(prompt):
            assert sum(packed) == 320 and max(packed) <= 32


@pytest.mark.asyncio
async def test_naming_a_long_prompt_gives_others_their_turn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("kvlayer.api.naming._STEP", 16)
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    async with Cache.open(config(), layout()) as cache:
        counting = asyncio.create_task(count())
        for name in (cache.named, cache.control.explain):
            before = turns
            await name(tokens(320))
            assert turns - before >= 320 // 16
        async with cache.lookup(tokens(320)):
            pass
        assert (await cache.named(tokens(320))).links == cache.chain(tokens(320)).links
        counting.cancel()
