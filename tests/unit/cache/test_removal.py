"""``evict`` and ``clear`` say what they could not do: whoever erases KV must know what is left."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest
from caches import config, layout, tokens
from engine import Engine

from kvlayer import Cache
from kvlayer.abc.backend import DeleteResult, Listed
from kvlayer.errors import BackendError
from kvlayer.keys import ObjectKey
from kvlayer.tier.objects import Objects
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
