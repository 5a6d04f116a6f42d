"""A damaged object is a miss with its cause, is put aside, and is stored again."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from caches import config, layout, stored_files, tokens
from engine import Engine, same
from xxhash import xxh3_64_intdigest

from kvlayer import Cache, Cause, Scope
from kvlayer.events import Event, ObjectQuarantined

_PUBLIC = Scope()


def _truncate(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 1)


def _truncate_to_the_header(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(4096)


def _truncate_inside_the_header(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(100)


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def _misplace(path: Path) -> None:
    other = next(p for p in stored_files(path.parents[3]) if p != path)
    shutil.copyfile(other, path)


def _of_a_later_release(path: Path) -> None:
    """The first 24 bytes mean the same in every version of the frame."""
    data = bytearray(path.read_bytes())
    data[8] += 1  # the frame version follows the magic
    length = int.from_bytes(data[12:16], "little")
    checksum = xxh3_64_intdigest(bytes(data[:16] + data[24 : 24 + length]))
    data[16:24] = checksum.to_bytes(8, "little")
    path.write_bytes(data)


DAMAGES: dict[str, tuple[Callable[[Path], None], Cause]] = {
    "a truncated object": (_truncate, Cause.TRUNCATED),
    "an object cut after its header": (_truncate_to_the_header, Cause.TRUNCATED),
    "an object cut inside its header": (_truncate_inside_the_header, Cause.TRUNCATED),
    "a zero-length object": (_empty, Cause.EMPTY),
    "a flipped bit of the payload": (lambda path: _flip(path, 4096 + 7), Cause.CORRUPT),
    "a flipped bit of the header": (lambda path: _flip(path, 60), Cause.CORRUPT),
    "a flipped bit of the magic": (lambda path: _flip(path, 0), Cause.CORRUPT),
    "a misplaced object": (_misplace, Cause.MISPLACED),
    "a flipped bit of the version": (lambda path: _flip(path, 8), Cause.CORRUPT),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.asyncio
async def test_damage_is_a_miss_with_its_cause_and_is_stored_again(
    tmp_path: Path, damage: str
) -> None:
    harm, cause = DAMAGES[damage]
    engine, other = Engine(layout(), 32, 1), Engine(layout(), 32, 2)
    prompt, slots = tokens(64), engine.slots(64)
    async with Cache.open(config(tmp_path), layout()) as cache:
        chain = cache.chain(prompt, scope=_PUBLIC)
        await cache.store(prompt, engine.view(slots))
    victim = next(p for p in stored_files(tmp_path) if chain.hashes[2].hex() in p.name)
    harm(victim)

    events: list[Event] = []
    async with Cache.open(config(tmp_path), layout(), sinks=[events.append]) as cache:
        async with cache.lookup(prompt) as hit:
            assert hit.tokens == 64
            report = await cache.retrieve(hit, other.view(slots))
        assert report.tokens == 32  # the correct prefix
        assert [failure.cause for failure in report.failed] == [cause]
        assert same(engine.read(slots[:32]), other.read(slots[:32]))

        (gone,) = [event for event in events if isinstance(event, ObjectQuarantined)]
        assert (gone.cause, gone.key.end_hash) == (cause, chain.hashes[2])
        assert cache.control.stats().tiers[1].misses == {cause: 1}
        explained = await cache.control.explain(prompt)
        assert explained.hit_tokens == 32
        assert [miss.cause for miss in explained.misses] == [cause]
        assert not victim.exists()

        again = await cache.store(prompt, engine.view(slots))
        assert (again.stored, again.skipped, again.failed) == (1, 3, ())
    async with Cache.open(config(tmp_path), layout()) as cache, cache.lookup(prompt) as hit:
        assert (await cache.retrieve(hit, other.view(slots))).tokens == 64
    assert same(engine.read(slots), other.read(slots))


@pytest.mark.asyncio
async def test_an_object_of_a_later_release_is_a_counted_miss_and_stays_where_it_is(
    tmp_path: Path,
) -> None:
    engine, other = Engine(layout(), 32, 1), Engine(layout(), 32, 2)
    prompt, slots = tokens(64), engine.slots(64)
    async with Cache.open(config(tmp_path), layout()) as cache:
        chain = cache.chain(prompt)
        await cache.store(prompt, engine.view(slots))
    theirs = next(p for p in stored_files(tmp_path) if chain.hashes[2].hex() in p.name)
    _of_a_later_release(theirs)
    before = theirs.read_bytes()

    events: list[Event] = []
    async with Cache.open(config(tmp_path), layout(), sinks=[events.append]) as cache:
        async with cache.lookup(prompt) as hit:
            report = await cache.retrieve(hit, other.view(slots))
        assert report.tokens == 32
        assert [failure.cause for failure in report.failed] == [Cause.FOREIGN_VERSION]
        assert not [event for event in events if isinstance(event, ObjectQuarantined)]
        assert cache.control.stats().tiers[1].misses == {Cause.FOREIGN_VERSION: 1}
        async with cache.lookup(prompt) as hit:  # it is not offered again
            assert hit.tokens == 32
        (miss,) = (await cache.control.explain(prompt)).misses
        assert miss.cause is Cause.FOREIGN_VERSION
        again = await cache.store(prompt, engine.view(slots))
        assert (again.stored, again.failed) == (1, ())
        async with cache.lookup(prompt) as hit:  # host memory has it
            assert (await cache.retrieve(hit, other.view(slots))).tokens == 64
    assert same(engine.read(slots), other.read(slots))
    assert theirs.read_bytes() == before


@pytest.mark.asyncio
async def test_an_object_deleted_between_lookup_and_load_is_a_miss(tmp_path: Path) -> None:
    engine, other = Engine(layout(), 32, 1), Engine(layout(), 32, 2)
    prompt, slots = tokens(64), engine.slots(64)
    async with Cache.open(config(tmp_path), layout()) as cache:
        chain = cache.chain(prompt, scope=_PUBLIC)
        await cache.store(prompt, engine.view(slots))
    async with Cache.open(config(tmp_path), layout()) as cache:
        async with cache.lookup(prompt) as hit:
            for path in stored_files(tmp_path):
                if chain.hashes[1].hex() in path.name:
                    path.unlink()
            report = await cache.retrieve(hit, other.view(slots))
        assert report.tokens == 16
        assert [failure.cause for failure in report.failed] == [Cause.VANISHED]
        assert (await cache.store(prompt, engine.view(slots))).stored == 1
    assert same(engine.read(slots[:16]), other.read(slots[:16]))


@pytest.mark.asyncio
async def test_damage_in_the_last_chunk_leaves_the_rest_of_the_hit(tmp_path: Path) -> None:
    engine, other = Engine(layout(), 32, 1), Engine(layout(), 32, 2)
    prompt, slots = tokens(64), engine.slots(64)
    async with Cache.open(config(tmp_path), layout()) as cache:
        chain = cache.chain(prompt, scope=_PUBLIC)
        await cache.store(prompt, engine.view(slots))
    for path in stored_files(tmp_path):
        if chain.hashes[3].hex() in path.name:
            _flip(path, 5000)
    async with Cache.open(config(tmp_path), layout()) as cache, cache.lookup(prompt) as hit:
        assert (await cache.retrieve(hit, other.view(slots))).tokens == 48
    assert same(engine.read(slots[:48]), other.read(slots[:48]))
