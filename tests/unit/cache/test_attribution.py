"""What one request asked for, got and from where: its events carry its owner and add up."""

from __future__ import annotations

from pathlib import Path

import pytest
from caches import config, layout, stored_files, tokens
from engine import Engine

from kvlayer import Cache, Scope
from kvlayer.events import Event, LookupDone, PrefetchDone, RetrieveDone, StoreDone
from kvlayer.tier.planner import sources

ANN = Scope(owner="ann")
OBJECT = 4096  # a chunk of the test layout has 3 KiB and takes a page


def of(heard: list[Event], kind: type[Event]) -> list[Event]:
    return [event for event in heard if isinstance(event, kind)]


@pytest.fixture
def engine() -> Engine:
    return Engine(layout(), 64)


async def _store(directory: Path, engine: Engine, length: int = 64) -> None:
    async with Cache.open(config(directory), layout()) as cache:
        await cache.store(tokens(length), engine.view(engine.slots(length)))


@pytest.mark.asyncio
async def test_a_request_served_from_disk_and_memory_says_how_much_from_each(
    tmp_path: Path, engine: Engine
) -> None:
    await _store(tmp_path, engine)
    heard: list[Event] = []
    async with Cache.open(config(tmp_path), layout(), sinks=[heard.append]) as cache:
        async with cache.lookup(tokens(32)) as hit:
            await cache.retrieve(hit, engine.view(engine.slots(32)))
        heard.clear()
        async with cache.lookup(tokens(64), scope=ANN) as hit:
            await cache.retrieve(hit, engine.view(engine.slots(64)))
    looked, loaded = heard[1], heard[-1]
    assert isinstance(looked, LookupDone) and isinstance(loaded, RetrieveDone)
    assert (looked.owner, loaded.owner) == ("ann", "ann")
    assert looked.by_tier == {"cpu": 32, "file": 32} == loaded.by_tier
    assert loaded.nbytes_by_tier == {"cpu": loaded.nbytes // 2, "file": loaded.nbytes // 2}
    assert loaded.nbytes == 4 * OBJECT


@pytest.mark.asyncio
async def test_only_what_was_asked_for_and_loaded_is_attributed(
    tmp_path: Path, engine: Engine
) -> None:
    await _store(tmp_path, engine)
    heard: list[Event] = []
    async with Cache.open(config(tmp_path), layout(), sinks=[heard.append]) as cache:
        async with cache.lookup(tokens(64)) as hit:
            await cache.retrieve(hit, engine.view(engine.slots(24)), first_token=20)
    (loaded,) = of(heard, RetrieveDone)
    assert isinstance(loaded, RetrieveDone)
    assert (loaded.tokens, loaded.by_tier) == (44, {"cpu": 0, "file": 24})
    assert loaded.nbytes_by_tier == {"cpu": 0, "file": loaded.nbytes}
    assert loaded.nbytes == 2 * OBJECT  # the chunks that were touched


@pytest.mark.asyncio
async def test_what_could_not_be_loaded_is_not_attributed(tmp_path: Path, engine: Engine) -> None:
    await _store(tmp_path, engine)
    for path in stored_files(tmp_path):
        path.write_bytes(b"")
    heard: list[Event] = []
    async with Cache.open(config(tmp_path), layout(), sinks=[heard.append]) as cache:
        async with cache.lookup(tokens(64)) as hit:
            await cache.retrieve(hit, engine.view(engine.slots(64)))
    (loaded,) = of(heard, RetrieveDone)
    assert isinstance(loaded, RetrieveDone)
    assert (loaded.tokens, loaded.nbytes, sum(loaded.by_tier.values())) == (0, 0, 0)
    assert sum(loaded.nbytes_by_tier.values()) == 0


@pytest.mark.asyncio
async def test_a_prefetch_is_its_owners_too(tmp_path: Path, engine: Engine) -> None:
    await _store(tmp_path, engine)
    heard: list[Event] = []
    async with Cache.open(config(tmp_path), layout(), sinks=[heard.append]) as cache:
        await cache.prefetch([*tokens(64), 7], scope=ANN)
        cancelled = cache.prefetch(tokens(64), scope=ANN)
        cancelled.cancel()
    (done,) = of(heard, PrefetchDone)
    assert isinstance(done, PrefetchDone)
    assert (done.owner, done.asked_tokens, done.tokens, done.failed) == ("ann", 65, 64, ())
    assert done.seconds > 0


@pytest.mark.asyncio
async def test_a_store_is_its_owners_and_counts_its_bytes(engine: Engine) -> None:
    heard: list[Event] = []
    async with Cache.open(config(), layout(), sinks=[heard.append]) as cache:
        await cache.store(tokens(32), engine.view(engine.slots(32)), scope=ANN)
    (done,) = of(heard, StoreDone)
    assert isinstance(done, StoreDone)
    assert (done.owner, done.stored, done.nbytes) == ("ann", 2, 2 * OBJECT)


@pytest.mark.asyncio
async def test_without_listeners_no_source_is_looked_at(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("computed for nobody")

    monkeypatch.setattr(sources.Sources, "taking", refuse)
    monkeypatch.setattr(sources.Sources, "served", refuse)
    async with Cache.open(config(), layout()) as cache:
        view = engine.view(engine.slots(32))
        await cache.store(tokens(32), view)
        async with cache.lookup(tokens(32)) as hit:
            assert (await cache.retrieve(hit, view)).tokens == 32
