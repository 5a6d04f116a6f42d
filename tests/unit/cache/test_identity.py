"""Who shares KV and who never does, in one directory."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
from caches import WEIGHTS, config, group, layout, stored_files, tokens
from engine import Engine, same

from kvlayer import Cache, CacheConfig, Content, KVLayout, ModelConfig, Salt, Scope, TierConfig
from kvlayer.errors import IdentityError
from kvlayer.layout import FUSED_HND, NHD


async def _store(cache: Cache, scope: Scope, length: int = 64) -> int:
    engine = Engine(layout(), 32)
    report = await cache.store(tokens(length), engine.view(engine.slots(length)), scope=scope)
    return report.stored


async def _found(cache: Cache, scope: Scope, length: int = 64) -> int:
    async with cache.lookup(tokens(length), scope=scope) as hit:
        return hit.tokens


SCOPES = {
    "public": Scope(),
    "tenant a": Scope.private("a"),
    "tenant b": Scope.private("b"),
    "adapter": Scope(adapter=b"\1" * 32),
    "other adapter": Scope(adapter=b"\2" * 32),
    "tenant a with adapter": Scope(salts=(Salt("a"),), adapter=b"\1" * 32),
    "image": Scope(contents=(Content(b"\1" * 32, 0),)),
    "other image": Scope(contents=(Content(b"\2" * 32, 0),)),
}


@pytest.mark.parametrize("writer", SCOPES)
@pytest.mark.asyncio
async def test_scopes_in_one_directory_never_see_each_other(tmp_path: Path, writer: str) -> None:
    async with Cache.open(config(tmp_path), layout()) as cache:
        assert await _store(cache, SCOPES[writer]) == 4
        for reader, scope in SCOPES.items():
            assert await _found(cache, scope) == (64 if reader == writer else 0)


@pytest.mark.asyncio
async def test_a_salt_that_starts_later_shares_what_precedes_it(tmp_path: Path) -> None:
    async with Cache.open(config(tmp_path), layout()) as cache:
        await _store(cache, Scope.private("a", first_token=40))
        assert await _found(cache, Scope()) == 32  # the chunk 32..48 is private as a whole
        assert await _found(cache, Scope.private("b", first_token=40)) == 32
        assert await _found(cache, Scope.private("a", first_token=40)) == 64
    folders = {path.parent.name for path in stored_files(tmp_path)}
    assert {name for name in folders if len(name) > 2} == {Salt("a").zone}
    assert len(folders) > 1  # and what precedes the salt is everybody's


NAMESPACES = {
    "weights": {"weights": "sha256:" + "cd" * 32},
    "compute dtype": {"compute_dtype": "float32"},
    "overrides": {"overrides": {"rope_scaling": 2.0}},
    "KV scales": {"kv_scales": "v2"},
}


@pytest.mark.parametrize("field", NAMESPACES)
@pytest.mark.asyncio
async def test_namespaces_in_one_directory_never_see_each_other(tmp_path: Path, field: str) -> None:
    ours = config(tmp_path)
    async with Cache.open(ours, layout()) as cache:
        await _store(cache, Scope())
    theirs = dataclasses.replace(ours, model=dataclasses.replace(ours.model, **NAMESPACES[field]))  # type: ignore[arg-type]
    async with Cache.open(theirs, layout()) as cache:
        await cache.recovered()
        assert await _found(cache, Scope()) == 0


@pytest.mark.asyncio
async def test_chunk_sizes_and_geometries_never_see_each_other(tmp_path: Path) -> None:
    async with Cache.open(config(tmp_path), layout()) as cache:
        await _store(cache, Scope())
    async with Cache.open(config(tmp_path, tokens_per_chunk=32), layout()) as cache:
        assert await _found(cache, Scope()) == 0
    other = KVLayout.single(group(dtype="float16"), NHD, tokens_per_block=4)
    async with Cache.open(config(tmp_path), other) as cache:
        assert await _found(cache, Scope()) == 0


@pytest.mark.asyncio
async def test_engines_with_other_block_sizes_and_layouts_share(tmp_path: Path) -> None:
    writer = Engine(layout(4), 32, 1)
    prompt, slots = tokens(64), writer.slots(64)
    async with Cache.open(config(tmp_path), layout(4)) as cache:
        await cache.store(prompt, writer.view(slots))
    fused = KVLayout.single(group(), FUSED_HND, tokens_per_block=8)
    reader = Engine(fused, 16, 2)
    other = reader.slots(64)
    async with Cache.open(config(tmp_path), fused) as cache, cache.lookup(prompt) as hit:
        assert (await cache.retrieve(hit, reader.view(other))).tokens == 64
    assert same(writer.read(slots), reader.read(other))


def _model(folder: Path, content: bytes) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "model.safetensors").write_bytes(content)
    return folder


@pytest.mark.asyncio
async def test_other_weights_under_the_same_name_are_another_namespace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = _model(tmp_path / "llama", b"one" * 1000)
    settings = config(tmp_path / "kv", weights=str(folder))
    async with Cache.open(settings, layout()) as cache:
        first = cache.namespace.digest
        await _store(cache, Scope())
    async with Cache.open(settings, layout()) as cache:
        assert cache.namespace.digest == first
        assert await _found(cache, Scope()) == 64
    _model(tmp_path / "llama", b"two" * 1000)
    async with Cache.open(settings, layout()) as cache:
        assert cache.namespace.digest != first
        assert await _found(cache, Scope()) == 0
    moved = config(tmp_path / "kv", weights=str(_model(tmp_path / "copy", b"one" * 1000)))
    async with Cache.open(moved, layout()) as cache:
        assert await _found(cache, Scope()) == 64


@pytest.mark.asyncio
async def test_kv_of_unknown_weights_does_not_leave_the_process(tmp_path: Path) -> None:
    with pytest.raises(IdentityError, match="outlives or is shared") as caught:
        async with Cache.open(config(tmp_path, weights=""), layout()):
            pass
    assert caught.value.hint is not None and "model.weights" in caught.value.hint
    async with Cache.open(config(weights=""), layout()) as cache:  # host memory alone is fine
        assert await _store(cache, Scope()) == 4
        first = cache.namespace.digest
    async with Cache.open(config(weights=""), layout()) as cache:
        assert cache.namespace.digest != first


CHILD = """
import asyncio, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from caches import config, layout, tokens
from engine import Engine
from kvlayer import Cache

async def main():
    engine = Engine(layout(), 32, 1)
    async with Cache.open(config(Path(sys.argv[1])), layout()) as cache:
        report = await cache.store(tokens(64), engine.view(engine.slots(64)))
        print(report.stored, report.skipped, len(report.failed))

asyncio.run(main())
"""


@pytest.mark.asyncio
async def test_the_same_content_of_two_processes_is_shared_and_stored_once(tmp_path: Path) -> None:
    engine, other = Engine(layout(), 32, 1), Engine(layout(), 32, 2)
    slots = engine.slots(64)
    support = Path(__file__).parents[2] / "support"
    command = [sys.executable, "-c", CHILD, str(tmp_path), str(support)]
    async with Cache.open(config(tmp_path), layout()) as cache:
        await cache.recovered()  # the directory is known to be empty before the other writes
        children = [
            subprocess.Popen(command, stdout=subprocess.PIPE, text=True)  # noqa: ASYNC220
            for _ in range(2)
        ]
        for child in children:
            out, _ = child.communicate()
            assert child.returncode == 0
            stored, skipped, failed = map(int, out.split())
            assert (stored + skipped, failed) == (4, 0)
        files = {path: path.stat().st_ino for path in stored_files(tmp_path)}
        assert len(files) == 4
        async with cache.lookup(tokens(64)) as hit:  # seen by a process that opened earlier
            assert hit.tokens == 64
            assert (await cache.retrieve(hit, other.view(slots))).tokens == 64
        assert (await cache.store(tokens(64), engine.view(slots))).stored == 0
    assert {path: path.stat().st_ino for path in stored_files(tmp_path)} == files
    assert same(engine.read(slots), other.read(slots))


@pytest.mark.asyncio
async def test_a_layout_that_is_not_the_namespaces_is_refused() -> None:
    async with Cache.open(config(), layout()) as cache:
        namespace = cache.namespace
    other = KVLayout.single(group(heads=4), NHD, tokens_per_block=4)
    settings = CacheConfig(model=ModelConfig(weights=WEIGHTS), tiers=(TierConfig(url="cpu://"),))
    with pytest.raises(IdentityError, match="different KV groups"):
        async with Cache.open(settings, other, namespace):
            pass


@pytest.mark.parametrize("dtype", ["fp8_e4m3", "fp8_e5m2", "int8"])
@pytest.mark.asyncio
async def test_a_quantised_kv_cache_asks_what_attention_is_computed_in(dtype: str) -> None:
    quantised = KVLayout.single(group(dtype=dtype), NHD, tokens_per_block=4)
    settings = CacheConfig(tiers=(TierConfig(url="cpu://?capacity=1MiB"),))
    with pytest.raises(IdentityError, match=f"model.compute_dtype is not set.*{dtype}") as caught:
        async with Cache.open(settings, quantised):
            pass
    assert "bfloat16" in str(caught.value.hint)
    said = dataclasses.replace(settings, model=ModelConfig(compute_dtype="bfloat16"))
    async with Cache.open(said, quantised) as cache:
        assert cache.namespace.compute_dtype == "bfloat16"
