"""How fast KV reaches a tier of files and comes back, beside bare threads moving as many bytes."""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

from kvlayer.api.cache import Cache
from kvlayer.bench.bare import BareFiles, forget, takes_direct
from kvlayer.bench.measure import Row, Taken, stopwatch
from kvlayer.bench.prompts import prompt
from kvlayer.config.model import CacheConfig, ModelConfig, TierConfig
from kvlayer.errors import BackendError
from kvlayer.layout import NHD, AttentionKind, KVGroup, KVLayout, KVView
from kvlayer.staging.sample import paged_view

__all__ = ["file_rows"]

_CHUNK = 256
_BLOCK = 16
_THREADS = 8  # the default of file://
_PATIENT = 3600.0  # seconds: a slow disk is a figure, not a miss
_MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class _Shape:
    """What is moved: ``prompts`` prompts of ``chunks`` chunks, an object of ``layers`` MiB each."""

    layers: int
    chunks: int
    prompts: int

    @property
    def objects(self) -> int:
        return self.chunks * self.prompts

    @property
    def object_nbytes(self) -> int:
        return self.layers * _MIB

    @property
    def nbytes(self) -> int:
        return self.objects * self.object_nbytes

    def prompt(self, number: int, at: int) -> array[int]:
        """Prompt ``at`` of a round: never seen before."""
        return prompt(self.chunks * _CHUNK, seed=number * self.prompts + at)

    def layout(self) -> KVLayout:
        # A layer of Llama-3-8B: 8 KV heads of 128 in bf16, which is 1 MiB for a chunk of 256.
        group = KVGroup(AttentionKind.MHA, tuple(range(self.layers)), "bfloat16", 8, 128)
        return KVLayout.single(group, NHD, tokens_per_block=_BLOCK)


async def file_rows(
    nbytes: int, rounds: int, directory: Path, say: Callable[[str], None]
) -> list[Row]:
    """``file.write`` and ``file.read.cold`` in bytes/s, and the same of small objects.

    About ``nbytes`` are moved at a time, in objects of 32 MiB (a chunk of Llama-3-8B), a quarter
    of that in objects of 1 MiB. ``directory`` must exist, on a disk with room for twice as much; at
    most as much host memory is used. ``say`` is told what goes on. What is written is deleted.

    Writing is ``store`` and ``flush`` of one prompt after the other; reading brings all of them
    into empty host memory and verifies them. Nothing comes from the page cache.
    """
    large = _Shape(layers=32, chunks=2, prompts=max(nbytes // (2 * 32 * _MIB), 1))
    small = _Shape(layers=1, chunks=min(large.nbytes // (4 * 8 * _MIB), 32), prompts=8)
    rows: list[Row] = []
    for shape, write, read in (
        (large, "file.write", "file.read.cold"),
        (small, "file.write.small", "file.read.small"),
    ):
        found = await _measure(shape, rounds, directory, say)
        rows.append(Row.moved(write, shape.nbytes, found.writes, found.bare_writes))
        rows.append(Row.moved(read, shape.nbytes, found.reads, found.bare_reads))
    return rows


@dataclass(slots=True)
class _Samples:
    """Of each direction: what ours took, and the seconds of the bare threads."""

    writes: list[Taken] = field(default_factory=list[Taken])
    bare_writes: list[float] = field(default_factory=list[float])
    reads: list[Taken] = field(default_factory=list[Taken])
    bare_reads: list[float] = field(default_factory=list[float])

    def after_the_first(self) -> _Samples:
        return _Samples(self.writes[1:], self.bare_writes[1:], self.reads[1:], self.bare_reads[1:])


async def _measure(
    shape: _Shape, rounds: int, directory: Path, say: Callable[[str], None]
) -> _Samples:
    """Both directions, ours and the bare threads' in turn; who goes first changes every round."""
    found = _Samples()
    direct = takes_direct(directory)
    async with _opened(shape, directory, direct=direct) as tier:
        with BareFiles(directory, tier.bodies(), _THREADS, direct=direct) as bare:
            for number in range(1 + rounds):
                say(f"{shape.objects} objects of {shape.layers} MiB, round {number} of {rounds}")
                prompts = [shape.prompt(number, at) for at in range(shape.prompts)]
                for turn in range(2):
                    if (number + turn) % 2:
                        found.writes.append(await tier.write(prompts))
                    else:
                        found.bare_writes.append(bare.write())
                await tier.empty()
                for turn in range(2):
                    if not direct:
                        forget(directory)
                    if (number // 2 + turn) % 2:
                        found.reads.append(await tier.read(prompts))
                    else:
                        found.bare_reads.append(bare.read())
                await tier.delete()
                bare.remove()
    return found.after_the_first()  # which committed the slab


class _Tier:
    """A cache above a directory of files, and what its engine lends."""

    def __init__(self, shape: _Shape, cache: Cache, view: KVView) -> None:
        self._shape = shape
        self._cache = cache
        self._view = view

    def bodies(self) -> list[memoryview]:
        """The cache's own host memory, an object each: bare threads are to move the same pages.

        How many requests a disk is sent depends on where pages lie. Nothing else may be there.
        """
        slab, nbytes = self._cache.stack.objects.slab, self._shape.object_nbytes
        return [slab.view(at * nbytes, nbytes) for at in range(self._shape.objects)]

    async def write(self, prompts: Sequence[array[int]]) -> Taken:
        """Store the prompts one after the other, and wait until all of them are files."""
        with stopwatch() as taken:
            for tokens in prompts:
                await self._cache.store(tokens, self._view)
            await self._cache.flush()
        return taken

    async def read(self, prompts: Sequence[array[int]]) -> Taken:
        """Bring all prompts into host memory, which is empty before and after."""
        with stopwatch() as taken:
            async with asyncio.TaskGroup() as group:
                pins = [
                    group.create_task(self._cache.control.pin(tokens, seconds=_PATIENT))
                    for tokens in prompts
                ]
        found = sum(pin.result().tokens for pin in pins)
        for pin in pins:
            self._cache.control.unpin(pin.result())
        await self.empty()
        if found != sum(map(len, prompts)):
            troubles = [tier.detail for tier in self._cache.control.health().tiers if not tier.ok]
            raise BackendError(
                f"only {found} of {sum(map(len, prompts))} tokens came back from file://",
                hint="; ".join(troubles) or "is the disk full?",
            )
        return taken

    async def empty(self) -> None:
        """Give up what is in host memory."""
        await self._cache.control.clear("cpu")

    async def delete(self) -> None:
        """Delete the files."""
        await self._cache.control.clear()


@asynccontextmanager
async def _opened(shape: _Shape, directory: Path, *, direct: bool) -> AsyncGenerator[_Tier]:
    options = f"threads={_THREADS}&direct={'on' if direct else 'off'}"
    config = CacheConfig(
        model=ModelConfig(weights="sha256:" + "0" * 64),  # nobody's: random bits
        tiers=(
            TierConfig(url=f"cpu://?capacity={shape.nbytes}"),
            TierConfig(
                url=f"file://{quote(str(directory))}/kv?{options}",
                deadline_seconds=_PATIENT,
                max_inflight_bytes=shape.nbytes,  # all that is stored at once is written
            ),
        ),
    )
    layout = shape.layout()
    view = paged_view(layout, shape.chunks * _CHUNK // _BLOCK, seed=1)
    async with Cache.open(config, layout) as cache:
        yield _Tier(shape, cache, view)
