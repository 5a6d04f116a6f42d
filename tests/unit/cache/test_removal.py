"""``evict`` and ``clear`` say what they could not do: whoever erases KV must know what is left."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from caches import config, layout, tokens
from engine import Engine

from kvlayer import Cache, Cause
from kvlayer.abc.backend import DeleteResult, Listed, Read, ReadResult, Write, WriteResult
from kvlayer.errors import BackendError
from kvlayer.identity.keys import ObjectKey
from kvlayer.tier.transfer.objects import Objects
from kvlayer.tier.transfer.spills import Spills
from kvlayer_backends.file.backend import FileBackend


async def store(cache: Cache, *seeds: int) -> None:
    engine = Engine(layout(), 32)
    for seed in seeds:
        await cache.store(tokens(32, seed), engine.view(engine.slots(32)))
    await cache.flush()


def left(folder: Path) -> int:
    return len([path for path in folder.rglob("*.raw") if path.is_file()])


@pytest.mark.asyncio
@pytest.mark.parametrize("verb", ["evict", "clear"])
async def test_what_could_not_be_deleted_is_an_error_that_counts_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    async with Cache.open(config(tmp_path), layout()) as cache:
        await store(cache, 0)
        assert left(tmp_path) == 2
        unlink, spared = os.unlink, min(tmp_path.rglob("*.raw"))

        def some(path: str) -> None:
            if path == str(spared):
                raise PermissionError(1, "Operation not permitted")
            unlink(path)

        with monkeypatch.context() as patch:
            patch.setattr(os, "unlink", some)
            with pytest.raises(BackendError, match="1 of 2 objects are left in file") as caught:
                await (
                    cache.control.evict(tokens(32)) if verb == "evict" else cache.control.clear()
                )
        assert caught.value.hint
        assert left(tmp_path) == 1
        assert cache.control.stats().tiers[0].objects == 0  # all that can go is gone
        assert cache.control.health().tiers[1].ok is False
        assert await cache.control.clear() == 1
        assert left(tmp_path) == 0


@pytest.mark.asyncio
async def test_a_tier_that_cannot_be_listed_may_hold_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with Cache.open(config(tmp_path), layout()) as cache:
        await store(cache, 0)
        await cache.recovered()

        async def denied(_: FileBackend, prefix: str = "", /) -> AsyncIterator[Listed]:
            for entry in list[Listed]():
                yield entry
            raise BackendError(f"Too many open files, of {prefix}")

        with monkeypatch.context() as patch:
            patch.setattr(FileBackend, "list", denied)
            with pytest.raises(BackendError, match="file did not say what it holds"):
                await cache.control.clear()
        assert left(tmp_path) == 0  # what was known of is gone all the same


@pytest.mark.asyncio
async def test_a_tier_that_does_not_answer_is_not_asked_for_every_object(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with Cache.open(config(tmp_path), layout()) as cache:
        await store(cache, *range(20))
        asked = 0

        async def dead(_: Objects, tier: int, keys: Sequence[ObjectKey]) -> list[DeleteResult]:
            nonlocal asked
            asked += len(keys)
            raise BackendError(f"tier {tier} is dead")

        with monkeypatch.context() as patch:
            patch.setattr(Objects, "delete", dead)
            with pytest.raises(BackendError, match="40 of 40 objects are left in file"):
                await cache.control.clear()
        assert asked < 40


@pytest.mark.asyncio
async def test_the_deadline_is_that_of_a_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with Cache.open(config(tmp_path), layout()) as cache:
        await store(cache, *range(20))
        batches: list[int] = []
        delete = FileBackend.delete

        async def counted(files: FileBackend, keys: Sequence[ObjectKey], /) -> list[DeleteResult]:
            batches.append(len(keys))
            return await delete(files, keys)

        monkeypatch.setattr(FileBackend, "delete", counted)
        assert await cache.control.clear("file") == 40
        assert len(batches) > 1 and sum(batches) == 40


@pytest.mark.asyncio
@pytest.mark.parametrize("write", ["back", "through"])
@pytest.mark.parametrize("verb", ["evict", "clear"])
async def test_what_is_being_written_or_waits_for_it_is_removed_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: str, write: str
) -> None:
    begun, gate = asyncio.Event(), asyncio.Event()
    put = FileBackend.put

    async def slow(files: FileBackend, writes: Sequence[Write], /) -> list[WriteResult]:
        begun.set()
        await gate.wait()
        return await put(files, writes)

    monkeypatch.setattr(FileBackend, "put", slow)
    told = config(tmp_path, write=write)
    narrow = replace(told.tiers[1], max_inflight=4)
    async with Cache.open(replace(told, tiers=(told.tiers[0], narrow)), layout()) as cache:
        engine = Engine(layout(), 128)
        storing = asyncio.ensure_future(cache.store(tokens(128, 0), engine.view(engine.slots(128))))
        await begun.wait()
        assert cache.control.stats().tiers[1].queued  # the tier takes one or two at a time
        control = cache.control
        removing = asyncio.ensure_future(
            control.evict(tokens(128, 0)) if verb == "evict" else control.clear()
        )
        for _ in range(100):  # it waits for what is being written by then
            await asyncio.sleep(0)
        gate.set()
        assert await removing > 0
        report = await storing
        assert (report.failed != ()) is (write == "through")
        assert {failure.cause for failure in report.failed} <= {Cause.CLEARED}
        await cache.flush()
        async with cache.lookup(tokens(128, 0)) as hit:
            assert hit.tokens == 0
        assert left(tmp_path) == 0


@pytest.mark.asyncio
async def test_a_tier_that_does_not_get_done_with_a_write_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with Cache.open(config(tmp_path), layout()) as cache:
        monkeypatch.setattr(Spills, "_wait", _no_progress)
        begun, gate = asyncio.Event(), asyncio.Event()
        put = FileBackend.put

        async def slow(files: FileBackend, writes: Sequence[Write], /) -> list[WriteResult]:
            begun.set()
            await gate.wait()
            return await put(files, writes)

        monkeypatch.setattr(FileBackend, "put", slow)
        engine = Engine(layout(), 32)
        storing = asyncio.ensure_future(cache.store(tokens(32, 0), engine.view(engine.slots(32))))
        await begun.wait()
        with pytest.raises(BackendError, match="still being written to file"):
            await cache.control.clear()
        gate.set()
        await storing


async def _no_progress(_: Spills, write: object) -> tuple[Cause, str]:
    return Cause.DEADLINE, f"not written yet: {type(write).__name__}"


@pytest.mark.asyncio
@pytest.mark.parametrize("verb", ["evict", "clear"])
async def test_what_is_being_loaded_is_removed_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    begun, gate = asyncio.Event(), asyncio.Event()
    get = FileBackend.get

    async def slow(files: FileBackend, reads: Sequence[Read], /) -> list[ReadResult]:
        answer = await get(files, [Read(read.key, read.regions, read.offset) for read in reads])
        begun.set()  # they have the bytes, and nobody was told yet
        await gate.wait()
        return answer

    async with Cache.open(config(tmp_path), layout()) as cache:
        await store(cache, 0)
        await cache.recovered()
        await cache.control.evict(tokens(32, 0), tier="cpu")
        monkeypatch.setattr(FileBackend, "get", slow)
        loading = cache.prefetch(tokens(32, 0))
        await begun.wait()
        if verb == "evict":
            await cache.control.evict(tokens(32, 0))
        else:
            await cache.control.clear()
        gate.set()
        report = await loading
        assert report.tokens == 0
        async with cache.lookup(tokens(32, 0)) as hit:
            assert hit.tokens == 0
