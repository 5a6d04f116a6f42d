"""Releases that share one directory: each serves its own objects and touches no other's."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from caches import config, layout, stored_files, tokens
from engine import Engine, same
from xxhash import xxh3_64_intdigest

from kvlayer import Cache, Scope

A, B = "ab" * 32, "cd" * 32


def _other_release(root: Path, version: int) -> Path:
    """A directory as another release leaves it, in use: objects, a lock, what it is writing."""
    folder = root / f"v{version}"
    head = struct.pack("<8sHHIQ", b"KVLFRAME", version, 0, 1, xxh3_64_intdigest(b"\x80"))
    page = (head + b"\x80").ljust(4096, b"\0") + bytes(4096)
    for path in (
        *(
            f"{A}/{B[:2]}/0.{B}.g0.l0-3.h0-2.canonical",
            f"{A}/{B[:2]}/{B}-16.g0.l0-3.h0-2.canonical",
        ),
        *(f"{A}/namespace.msgpack", f"tmp/{'0' * 32}/1.part", "quarantine/0.x", "janitor.lock"),
    ):
        file = folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(page)
    return folder


def _seen(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {
        str(path): (path.read_bytes() if path.is_file() else b"", path.stat().st_mtime_ns)
        for path in [folder, *folder.rglob("*")]
    }


@pytest.mark.asyncio
async def test_what_other_releases_keep_in_the_directory_is_not_touched(tmp_path: Path) -> None:
    """Not by storing, loading, evicting, clearing, listing, the janitor, nor by its capacity."""
    others = [_other_release(tmp_path, version) for version in (1, 3)]
    before = [_seen(folder) for folder in others]
    engine, other = Engine(layout(), 32, 1), Engine(layout(), 32, 2)
    slots = engine.slots(64)
    small = config(tmp_path, file_options="&capacity=64KiB")  # of its own: theirs does not count
    async with Cache.open(small, layout()) as cache:
        await cache.recovered()
        for seed in range(8):
            report = await cache.store(
                tokens(64, seed), engine.view(slots), scope=Scope.private(f"tenant {seed % 2}")
            )
            assert report.stored == 4
        await cache.flush()
    async with Cache.open(small, layout()) as cache:
        await cache.recovered()
        private = Scope.private("tenant 1")
        async with cache.lookup(tokens(64, 7), scope=private) as hit:
            loaded = (await cache.retrieve(hit, other.view(slots))).tokens
        assert loaded > 0
        assert same(engine.read(slots[:loaded]), other.read(slots[:loaded]))
        assert await cache.control.evict(tokens(64, 7), scope=private) > 0
        await cache.control.clear()
    assert stored_files(tmp_path) == []
    assert [_seen(folder) for folder in others] == before


@pytest.mark.asyncio
async def test_objects_of_a_zone_lie_in_a_folder_of_their_own(tmp_path: Path) -> None:
    engine = Engine(layout(), 32)
    slots = engine.slots(64)
    scope = Scope.private("tenant", first_token=32)
    async with Cache.open(config(tmp_path), layout()) as cache:
        await cache.store(tokens(64), engine.view(slots), scope=scope)
        chain = cache.chain(tokens(64), scope)
    zone = scope.salts[0].zone
    names = {path.name[:64]: path.parent.name for path in stored_files(tmp_path)}
    assert names == {
        **{link.hex(): link.hex()[:2] for link in chain.hashes[:2]},
        **{link.hex(): zone for link in chain.hashes[2:]},
    }


@pytest.mark.asyncio
@pytest.mark.parametrize("encoding", ["2.zstd-1", "3.raw", "3.zstd-1.aes"])
async def test_an_object_in_an_encoding_that_nobody_here_reads_is_counted_and_may_be_evicted(
    tmp_path: Path, encoding: str
) -> None:
    """A codec or seal that is not here, or a later frame: never served, rewritten, quarantined."""
    engine, prompt = Engine(layout(), 32), tokens(64)
    slots = engine.slots(64)
    async with Cache.open(config(tmp_path), layout()) as cache:
        await cache.store(prompt, engine.view(slots))
        chain = cache.chain(prompt)
    ours = next(path for path in stored_files(tmp_path) if chain.hashes[2].hex() in path.name)
    theirs = ours.with_name(ours.name.removesuffix("2.raw") + encoding)
    ours.rename(theirs)
    before = theirs.read_bytes()

    async with Cache.open(config(tmp_path), layout()) as cache:
        await cache.recovered()
        assert cache.control.stats().tiers[1].foreign == 1
        async with cache.lookup(prompt) as hit:
            assert hit.tokens == 32
        assert (await cache.store(prompt, engine.view(slots))).failed == ()
        await cache.flush()
        assert ours.exists() and theirs.read_bytes() == before
        async with cache.lookup(prompt) as hit:
            assert hit.tokens == 64
        assert not [*tmp_path.glob("v2/quarantine/*")]
    full = config(tmp_path, file_options="&capacity=16KiB")
    async with Cache.open(full, layout()) as cache:
        await cache.recovered()
        for seed in range(1, 9):
            await cache.store(tokens(64, seed), engine.view(slots))
        await cache.flush()
        assert not theirs.exists()
