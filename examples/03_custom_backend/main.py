"""A storage backend of your own: seven methods, and a cache that uses it."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from time import time
from typing import ClassVar, Self

import torch

from kvlayer import AttentionKind, Cache, CacheConfig, KVGroup, KVLayout, KVView, TierConfig
from kvlayer.abc.backend import (
    Backend,
    Capability,
    DeleteResult,
    Hit,
    Listed,
    Miss,
    Read,
    ReadResult,
    SizeResult,
    Write,
    WriteResult,
)
from kvlayer.config.registry import BACKENDS
from kvlayer.errors import ClosedError, ConfigError
from kvlayer.identity.keys import ObjectKey
from kvlayer.layout import NHD
from kvlayer.urls import BackendURL


class DictBackend(Backend):
    """``dict://``: objects in a Python dictionary. Gone with the process."""

    scheme: ClassVar[str] = "dict"
    capabilities = frozenset({Capability.LIST})

    def __init__(self) -> None:
        self._objects: dict[ObjectKey, tuple[bytes, float]] = {}
        self._is_open = False

    @classmethod
    def from_url(cls, url: BackendURL, /) -> Self:
        if url.options or url.path or url.host:
            raise ConfigError(f"dict:// takes nothing, found {url}", hint="write dict://")
        return cls()

    async def open(self) -> None:
        self._is_open = True

    async def aclose(self) -> None:
        self._is_open = False
        self._objects.clear()

    async def contains(self, keys: Sequence[ObjectKey], /) -> list[SizeResult]:
        found = [self._objects.get(key) for key in keys]
        return [None if stored is None else len(stored[0]) for stored in found]

    async def get(self, reads: Sequence[Read], /) -> list[ReadResult]:
        return [self._get(read) for read in reads]

    def _get(self, read: Read) -> ReadResult:
        stored = self._objects.get(read.key)
        if stored is None:
            return Miss()
        at = read.offset
        for region in read.regions:  # lent memory: fill it, keep nothing of it
            part = stored[0][at : at + region.nbytes]
            region[: len(part)] = part
            at += len(part)
        return Hit(at - read.offset)

    async def put(self, writes: Sequence[Write], /) -> list[WriteResult]:
        if not self._is_open:
            raise ClosedError("dict:// is closed")
        for write in writes:
            self._objects.setdefault(write.key, (b"".join(write.regions), time()))
        return [None] * len(writes)

    async def delete(self, keys: Sequence[ObjectKey], /) -> list[DeleteResult]:
        for key in keys:
            self._objects.pop(key, None)
        return [None] * len(keys)

    async def list(self, prefix: str = "", /) -> AsyncIterator[Listed]:
        for key, (stored, used) in tuple(self._objects.items()):
            if key.startswith(prefix):
                yield Listed(key, len(stored), used)


async def main() -> None:
    group = KVGroup(AttentionKind.MHA, (0, 1), "float16", num_kv_heads=2, head_size=32)
    layout = KVLayout.single(group, NHD, tokens_per_block=16)
    config = CacheConfig(
        tiers=(TierConfig(url="cpu://?capacity=16MiB"), TierConfig(url="dict://")),
        tokens_per_chunk=64,
    )
    engine = [torch.randn((2, 32, 16, 2, 32), dtype=torch.float16) for _ in range(2)]
    before = [layer.clone() for layer in engine]
    prompt = list(range(256))
    view = KVView.single(engine, range(len(prompt)))

    # Installed backends are found by their entry point; this one is added by hand.
    backends = BACKENDS.extended({"dict": DictBackend})
    async with Cache.open(config, layout, backends=backends) as cache:
        await cache.store(prompt, view)
        await cache.flush()
        await cache.control.evict(prompt, tier="cpu")
        for layer in engine:
            layer.zero_()
        async with cache.lookup(prompt) as hit:
            print(f"found {hit.tokens} tokens: {dict(hit.by_tier)}")
            await cache.retrieve(hit, view)
    for left, right in zip(before, engine, strict=True):
        assert torch.equal(left[:, :16], right[:, :16])  # the blocks of the prompt
    print("loaded from dict://, bit for bit")


if __name__ == "__main__":
    asyncio.run(main())
