"""Objects that are coded on a tier: nothing above it knows, and who lacks the codec leaves them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from caches import config, layout, tokens
from codecs_of_tests import DOUBLES, GIVEN, SHRINKS, Shrinks
from coded_process import CHUNK, engine
from engine import Engine, same

from kvlayer import Cache, Cause, TierConfig
from kvlayer._steps import finish
from kvlayer.abc.backend import Read
from kvlayer.abc.codec import Codec, Coded
from kvlayer.codec.frame import parent_of
from kvlayer.config.model import CacheConfig
from kvlayer.config.registry import CODECS
from kvlayer.errors import ConfigError, PluginError, UnknownSchemeError
from kvlayer.events import Event, ObjectQuarantined
from kvlayer.payload import Payload, Segment
from kvlayer.tier.transfer.encodings import Coding, Raw
from kvlayer.tier.transfer.relay import Relayed
from kvlayer_backends.file.objects import ObjectFiles

CODINGS: dict[str, Coding] = {"doubles": DOUBLES, "shrinks": SHRINKS}
RAW_NBYTES = CHUNK * 3 * 2 * 2 * 8 * 2  # of a chunk


def settings(directory: Path, codec: str = "", **more: object) -> CacheConfig:
    return config(directory, tokens_per_chunk=CHUNK, codec=codec, **more)  # type: ignore[arg-type]


def opened(config: CacheConfig, **more: Any) -> AbstractAsyncContextManager[Cache]:
    return Cache.open(config, layout(), codecs=GIVEN, **more)


def files(directory: Path, coding: Coding) -> dict[Path, bytes]:
    found = (directory / "v2").rglob(f"*{coding.encoding}")
    return {path: path.read_bytes() for path in found if "quarantine" not in path.parts}


@pytest.fixture(params=CODINGS)
def codec(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def coding(codec: str) -> Coding:
    return CODINGS[codec]


@pytest.mark.asyncio
async def test_what_is_coded_comes_back_to_the_bit_also_in_part_and_after_a_restart(
    tmp_path: Path, codec: str, coding: Coding
) -> None:
    ours, other = engine(), engine(2)
    prompt, slots = tokens(4 * CHUNK + 24), ours.slots(4 * CHUNK + 24)
    async with opened(settings(tmp_path, codec)) as cache:
        assert (await cache.store(prompt, ours.view(slots))).failed == ()
        hashes = cache.chain(prompt).hashes
    stored = files(tmp_path, coding)
    for path, content in stored.items():  # it says itself what comes before it
        at = [*map(bytes.hex, hashes)].index(path.name[:64]) if "-64." in path.name else 4
        assert parent_of(content[:4096]) == (hashes[at - 1] if at else b"")
    assert len(stored) == 5 and not files(tmp_path, Raw())
    whole = sorted(len(content) - 4096 for content in stored.values())[1:]
    if coding is DOUBLES:
        assert whole == [2 * RAW_NBYTES] * 4
    else:
        assert max(whole) < RAW_NBYTES
    async with opened(settings(tmp_path, codec)) as cache:
        async with cache.lookup(prompt[: 2 * CHUNK + 8]) as hit:  # in part
            assert hit.tokens == 2 * CHUNK
            report = await cache.retrieve(hit, other.view(slots[: 2 * CHUNK]))
        assert report.tokens == 2 * CHUNK
        assert same(ours.read(slots[: 2 * CHUNK]), other.read(slots[: 2 * CHUNK]))
        async with cache.lookup(prompt) as hit:
            assert (await cache.retrieve(hit, other.view(slots))).tokens == len(prompt)
        assert same(ours.read(slots), other.read(slots))


@pytest.mark.asyncio
async def test_what_is_demoted_is_coded(tmp_path: Path, codec: str, coding: Coding) -> None:
    ours, other = engine(), engine(2)
    prompt, slots = tokens(4 * CHUNK), ours.slots(4 * CHUNK)
    small = {"host": f"{5 * RAW_NBYTES}", "write": "demote"}
    async with opened(
        settings(tmp_path, codec, high_watermark=0.5, low_watermark=0.25, **small)
    ) as cache:
        await cache.store(prompt, ours.view(slots))
        await cache.flush()
        demoted = cache.control.stats().tiers[0].demoted
        assert demoted and len(files(tmp_path, coding)) == demoted
        async with cache.lookup(prompt) as hit:
            assert (await cache.retrieve(hit, other.view(slots))).tokens == len(prompt)
    assert same(ours.read(slots), other.read(slots))


@pytest.mark.parametrize("at", [60, 4096 + 40])
@pytest.mark.asyncio
async def test_a_flipped_bit_of_what_is_coded_is_found_before_it_is_decoded(
    tmp_path: Path, codec: str, coding: Coding, at: int
) -> None:
    ours, other = engine(), engine(2)
    prompt, slots = tokens(3 * CHUNK), ours.slots(3 * CHUNK)
    events: list[Event] = []
    async with opened(settings(tmp_path, codec)) as cache:
        chain = cache.chain(prompt)
        await cache.store(prompt, ours.view(slots))
    (victim,) = [p for p in files(tmp_path, coding) if chain.hashes[1].hex() in p.name]
    damaged = bytearray(victim.read_bytes())
    damaged[at] ^= 1
    victim.write_bytes(damaged)
    async with opened(settings(tmp_path, codec), sinks=[events.append]) as cache:
        async with cache.lookup(prompt) as hit:
            report = await cache.retrieve(hit, other.view(slots))
        assert report.tokens == CHUNK
        assert [failure.cause for failure in report.failed] == [Cause.CORRUPT]
        assert any(isinstance(event, ObjectQuarantined) for event in events)
        assert not victim.exists()
        assert (await cache.store(prompt, ours.view(slots))).stored == 1
        assert victim.exists()
    assert same(ours.read(slots[:CHUNK]), other.read(slots[:CHUNK]))


@pytest.mark.asyncio
async def test_a_process_that_lacks_the_codec_counts_what_is_coded_and_leaves_it(
    tmp_path: Path, codec: str, coding: Coding
) -> None:
    ours, other = engine(), engine(2)
    prompt, slots = tokens(3 * CHUNK), ours.slots(3 * CHUNK)
    async with opened(settings(tmp_path, codec)) as cache:
        await cache.store(prompt, ours.view(slots))
    before = files(tmp_path, coding)
    async with Cache.open(settings(tmp_path), layout()) as lacking:
        await lacking.stack.recovered()
        assert lacking.control.stats().tiers[1].foreign == 3
        async with lacking.lookup(prompt) as hit:
            assert hit.tokens == 0
        assert (await lacking.store(prompt, ours.view(slots))).stored == 3
        assert files(tmp_path, coding) == before and len(files(tmp_path, Raw())) == 3
        async with opened(settings(tmp_path, codec)) as beside:
            async with beside.lookup(prompt) as hit:
                assert (await beside.retrieve(hit, other.view(slots))).tokens == len(prompt)
    assert same(ours.read(slots), other.read(slots))
    assert files(tmp_path, coding) == before
    assert not list((tmp_path / "v2").rglob("quarantine/*"))


@pytest.mark.parametrize("is_damaged", [False, True])
@pytest.mark.asyncio
async def test_a_tier_reads_the_encoding_it_had_before_and_writes_its_own(
    tmp_path: Path, codec: str, coding: Coding, is_damaged: bool
) -> None:
    ours, other = engine(), engine(2)
    prompt, slots = tokens(4 * CHUNK), ours.slots(4 * CHUNK)
    async with Cache.open(settings(tmp_path), layout()) as cache:
        chain = cache.chain(prompt)
        await cache.store(prompt[: 2 * CHUNK], ours.view(slots[: 2 * CHUNK]))
    if is_damaged:
        (victim,) = [p for p in files(tmp_path, Raw()) if chain.hashes[1].hex() in p.name]
        damaged = bytearray(victim.read_bytes())
        damaged[4096] ^= 1
        victim.write_bytes(damaged)
    async with opened(settings(tmp_path, codec)) as cache:
        await cache.stack.recovered()
        assert cache.control.stats().tiers[1].foreign == 0
        async with cache.lookup(prompt) as hit:
            assert hit.tokens == 2 * CHUNK
            report = await cache.retrieve(hit, other.view(slots))
        assert report.tokens == (CHUNK if is_damaged else 2 * CHUNK)
        if is_damaged:  # the one that was read is moved aside, under its own name
            assert [f.cause for f in report.failed] == [Cause.CORRUPT]
            assert not victim.exists()
        await cache.store(prompt, ours.view(slots))
        assert len(files(tmp_path, coding)) == (3 if is_damaged else 2)
        await cache.control.evict(prompt)
        assert not files(tmp_path, coding) and not files(tmp_path, Raw())
    assert same(ours.read(slots[:CHUNK]), other.read(slots[:CHUNK]))


def _taken(cache: Cache) -> int:
    return cache.control.stats().tiers[1].encoded_nbytes


@pytest.mark.asyncio
async def test_what_is_stored_takes_on_a_tier_is_known_however_it_was_learnt(
    tmp_path: Path, codec: str, coding: Coding
) -> None:
    ours, other = engine(), engine(2)
    prompt, slots = tokens(4 * CHUNK), ours.slots(4 * CHUNK)
    async with Cache.open(settings(tmp_path), layout()) as cache:  # as it was before
        await cache.store(prompt[:CHUNK], ours.view(slots[:CHUNK]))
    async with opened(settings(tmp_path, codec)) as cache:
        await cache.stack.recovered()
        assert _taken(cache) == sum(map(len, files(tmp_path, Raw()).values())) > 0
        await cache.store(prompt, ours.view(slots))  # written
        there = [*files(tmp_path, coding).values(), *files(tmp_path, Raw()).values()]
        assert len(there) == 4 and _taken(cache) == sum(map(len, there))
    taken = sum(map(len, there))
    async with opened(settings(tmp_path, codec)) as cache:
        await cache.stack.recovered()  # listed
        assert _taken(cache) == taken
        explained = await cache.control.explain(prompt)
        assert explained.encoded_nbytes == {"file": taken}
        records = finish(cache.stack.planner.known(cache.chain(prompt)))
        assert [record.encoding(1) for record in records] == [2, 1, 1, 1]
        async with cache.lookup(prompt) as hit:  # loaded
            assert (await cache.retrieve(hit, other.view(slots))).tokens == len(prompt)
        assert _taken(cache) == taken
        await cache.control.evict(prompt)
        assert _taken(cache) == 0 and not files(tmp_path, coding) and not files(tmp_path, Raw())


@pytest.mark.asyncio
async def test_an_object_is_asked_for_first_in_the_encoding_it_is_known_to_lie_in(
    tmp_path: Path, codec: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, other = engine(), engine(2)
    prompt, slots = tokens(3 * CHUNK), ours.slots(3 * CHUNK)
    async with Cache.open(settings(tmp_path), layout()) as cache:
        await cache.store(prompt, ours.view(slots))
    asked: list[str] = []
    read = ObjectFiles.read

    def reads(self: ObjectFiles, wanted: Read, used_ns: int | None) -> object:
        asked.append(wanted.key.rpartition("/")[2])
        return read(self, wanted, used_ns)

    monkeypatch.setattr(ObjectFiles, "read", reads)
    async with opened(settings(tmp_path, codec)) as cache:
        await cache.stack.recovered()
        async with cache.lookup(prompt) as hit:
            assert (await cache.retrieve(hit, other.view(slots))).tokens == len(prompt)
    assert asked == ["2.raw"] * 3
    assert same(ours.read(slots), other.read(slots))


@pytest.mark.asyncio
async def test_what_is_not_where_it_was_said_to_be_is_looked_for_in_the_other_encoding(
    tmp_path: Path, codec: str, coding: Coding
) -> None:
    """Another process has coded it anew since it was listed."""
    ours, other = engine(), engine(2)
    prompt, slots = tokens(3 * CHUNK), ours.slots(3 * CHUNK)
    async with Cache.open(settings(tmp_path), layout()) as cache:
        await cache.store(prompt, ours.view(slots))
    async with opened(settings(tmp_path, codec)) as cache:
        await cache.stack.recovered()
        before = _taken(cache)
        async with opened(settings(tmp_path / "other", codec)) as coder:
            await coder.store(prompt, ours.view(slots))
        for path in files(tmp_path / "other", coding):
            path.rename(tmp_path / path.relative_to(tmp_path / "other"))
        for path in files(tmp_path, Raw()):
            path.unlink()
        async with cache.lookup(prompt) as hit:
            assert (await cache.retrieve(hit, other.view(slots))).tokens == len(prompt)
        assert before != _taken(cache) == sum(map(len, files(tmp_path, coding).values()))
    assert same(ours.read(slots), other.read(slots))


class Raises(Shrinks):
    """Raises what is no ``Exception`` in one of its functions."""

    at = ""

    def _maybe(self, here: str) -> None:
        if here == self.at:
            raise SystemExit(here)

    def bound(self, payload: Payload, segment: Segment, /) -> int:
        self._maybe("bound")
        return super().bound(payload, segment)

    def encode(self, *given: Any) -> Coded:
        self._maybe("encode")
        return super().encode(*given)

    def decode(self, *given: Any) -> None:
        self._maybe("decode")
        super().decode(*given)


@pytest.mark.asyncio
@pytest.mark.parametrize("at", ["bound", "encode", "decode"])
@pytest.mark.parametrize("size", [8, 8 * CHUNK], ids=["on the loop", "on a thread"])
async def test_what_a_codec_raises_costs_its_objects_and_nobody_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str, size: int
) -> None:
    ours, codecs = Engine(layout(), 192, 1), CODECS.extended({"raises": Raises})
    prompt, view = tokens(size), ours.view(ours.slots(size))
    given = config(tmp_path, tokens_per_chunk=size, codec="raises")
    monkeypatch.setattr(Raises, "at", "" if at == "decode" else at)
    async with Cache.open(given, layout(), codecs=codecs) as cache:
        report = await cache.store(prompt, view)
        assert report.stored == 1 and len(report.failed) == (at != "decode")
        assert all(f"SystemExit: {at}" in failure.detail for failure in report.failed)
        monkeypatch.setattr(Raises, "at", "")
        again = tokens(size, seed=2)
        assert (await cache.store(again, view)).failed == ()  # the tier takes what is coded
        await cache.control.clear("cpu")
        monkeypatch.setattr(Raises, "at", "" if at == "encode" else at)
        async with cache.lookup(again) as hit:
            assert hit.tokens == size
            loaded = await cache.retrieve(hit, view)
        assert loaded.tokens == (size if at == "encode" else 0)
        assert all(f"SystemExit: {at}" in failure.detail for failure in loaded.failed)


class Scribbles(Shrinks):
    """Writes what it was lent for reading, and says in types of its own how long it is."""

    def encode(
        self, payload: Payload, segment: Segment, raw: Sequence[memoryview], into: memoryview, /
    ) -> Coded:
        with suppress(TypeError):
            raw[0][0] ^= 1
        coded = super().encode(payload, segment, raw, into)
        return Coded(torch.tensor(coded.nbytes), True)  # type: ignore[arg-type]

    def decode(self, payload: Payload, segment: Segment, *given: Any) -> None:
        coded, meta_nbytes, into = given
        assert meta_nbytes == 1
        super().decode(payload, segment, coded, 4, into)


@pytest.mark.asyncio
async def test_a_codec_cannot_change_what_it_is_lent_for_reading(tmp_path: Path) -> None:
    ours, other = engine(), engine(2)
    slots, codecs = ours.slots(CHUNK), CODECS.extended({"scribbles": Scribbles})
    async with Cache.open(settings(tmp_path, "scribbles"), layout(), codecs=codecs) as cache:
        assert (await cache.store(tokens(CHUNK), ours.view(slots))).failed == ()
        for _ in range(2):  # from host memory, then from the disk
            async with cache.lookup(tokens(CHUNK)) as hit:
                assert (await cache.retrieve(hit, other.view(slots))).tokens == CHUNK
            assert same(ours.read(slots), other.read(slots))
            await cache.control.clear("cpu")


@pytest.mark.asyncio
async def test_frames_are_relayed_from_one_directory_to_another_and_served_there(
    tmp_path: Path, codec: str, coding: Coding
) -> None:
    ours, other = engine(), engine(2)
    prompt, slots = tokens(4 * CHUNK), ours.slots(4 * CHUNK)
    near, far = tmp_path / "near", tmp_path / "far"
    both = settings(near, codec)
    place = replace(both.tiers[1], url=f"file://{far}", write="never")
    async with opened(replace(both, tiers=(*both.tiers, place))) as cache:
        chain = cache.chain(prompt)
        await cache.store(prompt, ours.view(slots))
        records = finish(cache.stack.planner.known(chain))
        moves = [
            Relayed(record.key, record.start, parent=chain.span(at).parent)
            for at, record in enumerate(records)
        ]
        outcomes = await cache.stack.objects.relay(moves, 1, 2)
        assert [outcome.cause for outcome in outcomes] == [None] * 4
    before, after = files(near, coding), files(far, coding)
    assert len(after) == 4 and not files(far, Raw())
    assert {p.relative_to(near): b for p, b in before.items()} == {
        p.relative_to(far): b for p, b in after.items()
    }
    async with opened(settings(far, codec)) as cache, cache.lookup(prompt) as hit:
        assert (await cache.retrieve(hit, other.view(slots))).tokens == len(prompt)
    assert same(ours.read(slots), other.read(slots))


@pytest.mark.asyncio
async def test_a_codec_that_nobody_offers_is_refused_by_name_and_nothing_is_made(
    tmp_path: Path,
) -> None:
    with pytest.raises(UnknownSchemeError, match="no codec is called 'doubbles'") as caught:
        async with opened(settings(tmp_path / "kv", "doubbles")):
            pass
    assert "did you mean 'doubles'" in str(caught.value)
    assert "shrinks (given by hand)" in (caught.value.hint or "")
    with pytest.raises(UnknownSchemeError, match="no codec is called 'doubles'") as caught:
        async with Cache.open(settings(tmp_path / "kv", "doubles"), layout()):
            pass
    assert "kvlayer.codecs" in (caught.value.hint or "")
    assert not (tmp_path / "kv").exists()


class Raising(Shrinks):
    def __init__(self) -> None:
        raise SystemExit("no licence")


class Unnamed(Shrinks):
    name = "Not a name"


class Plain(Shrinks):
    name = "raw"


@pytest.mark.parametrize(
    ("cls", "said"), [(Raising, "no licence"), (Unnamed, "Not a name"), (Plain, "'raw'")]
)
@pytest.mark.asyncio
async def test_a_codec_that_cannot_be_made_is_its_plugins_fault(
    tmp_path: Path, cls: type[Codec], said: str
) -> None:
    codecs = CODECS.extended({"broken": cls})
    with pytest.raises(PluginError, match="'broken' could not be made") as caught:
        async with Cache.open(settings(tmp_path, "broken"), layout(), codecs=codecs):
            pass
    assert said in str(caught.value)


def test_host_memory_is_given_no_codec() -> None:
    with pytest.raises(ConfigError, match=r"tiers\.0\.codec must be empty"):
        CacheConfig(tiers=(TierConfig(url="cpu://?capacity=1MiB", codec="doubles"),))
