"""Every misuse is answered clearly: what was expected, what was found, what to do next."""

from __future__ import annotations

import multiprocessing
import os
import stat
from array import array
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from caches import WEIGHTS, config, layout, tokens
from descriptors import descriptors
from engine import Engine
from hang import HANG

from kvlayer import Cache, CacheConfig, KVLayerError, KVView, ModelConfig, Portal, TierConfig
from kvlayer.errors import (
    BackendError,
    CapacityError,
    ClosedError,
    ConfigError,
    ForkedError,
    LayoutError,
    TokensError,
    UnknownSchemeError,
    UnsupportedError,
)


def _with_tiers(*urls: str) -> CacheConfig:
    return CacheConfig(
        model=ModelConfig(weights=WEIGHTS), tiers=tuple(TierConfig(url=url) for url in urls)
    )


async def _refused(settings: CacheConfig, kind: type[KVLayerError]) -> KVLayerError:
    with pytest.raises(kind) as caught:
        async with Cache.open(settings, layout()):
            pass
    assert caught.value.hint, "an error says what to do next"
    return caught.value


@pytest.mark.asyncio
async def test_an_unknown_scheme_names_what_is_installed() -> None:
    error = await _refused(_with_tiers("cpu://", "flie:///tmp/kv"), UnknownSchemeError)
    assert "did you mean 'file'" in str(error)
    assert "kvlayer-core" in str(error.hint)


@pytest.mark.asyncio
async def test_an_unknown_option_names_the_nearest() -> None:
    error = await _refused(_with_tiers("cpu://?capasity=1GiB"), ConfigError)
    assert error.hint == "did you mean 'capacity'?"


@pytest.mark.asyncio
async def test_an_unknown_policy_names_what_is_installed() -> None:
    settings = CacheConfig(policy="prefix-lur", tiers=(TierConfig(url="cpu://"),))
    error = await _refused(settings, UnknownSchemeError)
    assert "did you mean 'prefix-lru'" in str(error)


@pytest.mark.asyncio
async def test_the_first_tier_must_be_host_memory(tmp_path: Path) -> None:
    error = await _refused(_with_tiers(f"file://{tmp_path}"), ConfigError)
    assert "must be host memory" in str(error)


@pytest.mark.asyncio
async def test_a_capacity_smaller_than_a_chunk_names_both_sizes() -> None:
    error = await _refused(_with_tiers("cpu://?capacity=8KiB"), CapacityError)
    assert "8192 bytes is smaller than one chunk of 49152 bytes" in str(error)


@pytest.mark.asyncio
async def test_a_capacity_smaller_than_a_page_is_refused() -> None:
    await _refused(_with_tiers("cpu://?capacity=100"), CapacityError)


@pytest.mark.asyncio
async def test_an_unwritable_directory_is_an_error_that_names_it(tmp_path: Path) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("not a directory")
    error = await _refused(_with_tiers("cpu://", f"file://{blocker}/kv"), BackendError)
    assert str(blocker) in str(error)


@pytest.mark.asyncio
async def test_a_refused_cache_leaves_nothing_open(tmp_path: Path) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("not a directory")
    before = descriptors()
    await _refused(_with_tiers("cpu://", f"file://{blocker}/kv"), BackendError)
    assert descriptors() == before


BAD_TOKENS: dict[str, Any] = {
    "floats": [1.0, 2.0],
    "a float array": np.zeros(4, np.float32),
    "a float tensor": torch.zeros(4),
    "a batch": torch.zeros((1, 4), dtype=torch.int64),
    "negative ids": [1, -2],
    "a negative tensor": torch.tensor([1, -2]),
    "ids past 32 bits": [1 << 40],
    "text": "The capital of France",
    "bytes": b"\1\2\3\4",
    "nothing": None,
}


@pytest.mark.parametrize("kind", BAD_TOKENS)
@pytest.mark.asyncio
async def test_tokens_of_the_wrong_kind_are_refused(kind: str) -> None:
    engine = Engine(layout(), 32)
    async with Cache.open(config(), layout()) as cache:
        with pytest.raises(TokensError):
            await cache.store(BAD_TOKENS[kind], engine.view(engine.slots(2)))
        with pytest.raises(TokensError):
            async with cache.lookup(BAD_TOKENS[kind]):
                pass
        with pytest.raises(TokensError):
            cache.prefetch(BAD_TOKENS[kind])


GOOD_TOKENS: dict[str, Callable[[array[int]], Any]] = {
    "a list": list,
    "an int32 array": lambda ids: np.array(ids, np.int32),
    "an int64 array": lambda ids: np.array(ids, np.int64),
    "an int64 tensor": lambda ids: torch.tensor(list(ids)),
    "a strided view": lambda ids: np.repeat(np.array(ids), 2)[::2],
}


@pytest.mark.parametrize("kind", GOOD_TOKENS)
@pytest.mark.asyncio
async def test_the_same_tokens_in_any_buffer_are_one_prompt(kind: str) -> None:
    engine = Engine(layout(), 32)
    async with Cache.open(config(), layout()) as cache:
        await cache.store(tokens(40), engine.view(engine.slots(40)))
        async with cache.lookup(GOOD_TOKENS[kind](tokens(40))) as hit:
            assert hit.tokens == 40


def _wrong_views(engine: Engine) -> dict[str, KVView]:
    layers, slots = engine.caches[0], engine.slots(16)
    return {
        "a layer is missing": KVView([layers[:-1]], [slots]),
        "a group is missing": KVView([], []),
        "the dtype is wrong": KVView([[layer.float() for layer in layers]], [slots]),
        "an axis is missing": KVView([[layer[0] for layer in layers]], [slots]),
        "too few heads": KVView([[layer[:, :, :, :1] for layer in layers]], [slots]),
        "another block size": KVView([[layer[:, :, :2] for layer in layers]], [slots]),
        "slots are floats": KVView([layers], [slots.float()]),
        "slots are 2-D": KVView([layers], [slots[None]]),
        "a slot out of range": KVView([layers], [slots + 10_000]),
        "a slot is missing": KVView([layers], [torch.where(slots == slots[3], -1, slots)]),
    }


@pytest.mark.parametrize("wrong", _wrong_views(Engine(layout(), 32)))
@pytest.mark.asyncio
async def test_a_view_that_is_not_the_layouts_is_refused_and_stores_nothing(wrong: str) -> None:
    view = _wrong_views(Engine(layout(), 32))[wrong]
    async with Cache.open(config(), layout()) as cache:
        with pytest.raises(LayoutError):
            await cache.store(tokens(16), view)
        stats = cache.control.stats()
        assert (stats.tiers[0].used_nbytes, stats.tiers[0].pinned_nbytes) == (0, 0)
        good = Engine(layout(), 32)
        assert (await cache.store(tokens(16), good.view(good.slots(16)))).stored == 1


@pytest.mark.asyncio
async def test_use_after_close_is_an_error() -> None:
    engine = Engine(layout(), 32)
    view = engine.view(engine.slots(16))
    async with Cache.open(config(), layout()) as cache:
        async with cache.lookup(tokens(16)) as hit:
            pass
    with pytest.raises(ClosedError):
        await cache.store(tokens(16), view)
    with pytest.raises(ClosedError):
        async with cache.lookup(tokens(16)):
            pass
    with pytest.raises(ClosedError):
        await cache.retrieve(hit, view)
    with pytest.raises(ClosedError):
        cache.prefetch(tokens(16))
    with pytest.raises(ClosedError):
        await cache.control.explain(tokens(16))
    with pytest.raises(ClosedError):
        cache.control.stats()


def _in_a_child(cache: Cache, portal: Portal, answer: Connection) -> None:
    found = []
    for use in (cache.control.stats, lambda: portal.call(Cache.flush)):
        try:
            use()
        except ForkedError as exc:
            found.append(str(exc))
    answer.send(found)


def test_use_in_a_forked_child_is_an_error_and_does_not_hang() -> None:
    with Portal.open(config(), layout()) as portal:
        fork = multiprocessing.get_context("fork")
        ours, theirs = fork.Pipe()
        child = fork.Process(target=_in_a_child, args=(portal.cache, portal, theirs))
        child.start()
        assert ours.poll(30), "the child hangs"
        found = ours.recv()
        child.join()
    assert len(found) == 2
    assert all(f"opened in process {os.getpid()}" in text for text in found)


@pytest.mark.may_skip("root writes wherever it likes")
@pytest.mark.asyncio
async def test_a_directory_without_write_permission_is_an_error(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root writes wherever it likes")
    tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    await _refused(_with_tiers("cpu://", f"file://{tmp_path}/kv"), BackendError)


@pytest.mark.asyncio
async def test_a_hit_of_another_cache_is_refused_and_moves_nothing() -> None:
    """Its offsets name other bytes here."""
    engine = Engine(layout(), 32, 1)
    view = engine.view(engine.slots(32))
    async with Cache.open(config(), layout()) as one, Cache.open(config(), layout()) as two:
        await one.store(tokens(32), view)
        await two.store(tokens(32, 1), view)
        async with one.lookup(tokens(32)) as hit, two.lookup(tokens(32, 1)):
            with pytest.raises(LayoutError, match="of this cache") as caught:
                await two.retrieve(hit, view)
            assert caught.value.hint
        with pytest.raises(LayoutError, match="of this cache"):
            await two.retrieve(hit, view)  # nor once its lease is over


def test_a_call_from_the_portals_own_loop_is_refused() -> None:
    async def inner(cache: Cache) -> None:
        await cache.flush()

    with Portal.open(config(), layout()) as portal:

        async def outer(cache: Cache) -> None:
            portal.call(inner)

        with pytest.raises(UnsupportedError, match="own loop") as caught:
            portal.submit(outer).result(HANG)
    assert caught.value.hint
